"""What differs between one process and many; the loop, the checkpoints and the evaluation are written once.

``ranks`` is the group of processes and what it agrees on, ``seeds`` the noise that belongs to no rank, ``strategy``
what a way of sharing the training has to do, ``plain`` the first of them, ``fragments`` what of the state a rank owns.
"""
