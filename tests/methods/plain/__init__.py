"""The eight methods as plain PyTorch. They share with the methods data, seeds and how a network is made, nothing else."""
