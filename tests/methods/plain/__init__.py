"""The eight methods as plain PyTorch. They share data, seeds and how a network is made with the methods."""
