"""The state of training on disk: published whole or not at all, verified before it is believed.

``format`` says what a published folder holds and whether it is whole, ``publish`` is all that changes the folders,
``resume`` finds the one to go on from and fills the tensors of any strategy and world size from it.
"""
