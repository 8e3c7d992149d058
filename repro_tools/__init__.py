"""The tools around the engine `repro`: what reads the specification, estimates, checks, diagnoses and judges.

They come to a project from outside and work with the engine that lies in it (`repro_tools.project`).
"""
