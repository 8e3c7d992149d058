"""Eight methods with training loops of their own, as examples and as tests of the engine.

wgan_gp         two networks, two optimisers, unequal numbers of updates, a moving average
ppo             rounds of data from an environment that goes on
maml            gradients of second order
sam             two gradients for one step
lbfgs           an optimiser that asks for the loss itself
em              no gradients at all
bank            pseudo-labels from the network itself, an optimiser that begins anew
language_model  rows of unequal length, tied weights, a scheduler

Each has a twin in `plain` that uses no engine, and must end in the same bits.
"""
