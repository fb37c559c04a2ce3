"""The operations of the folder above as Triton kernels, one file each; imported only where a device runs them.

A function here has the name and the result of the reference in plain torch, which is the truth. Numbers are read as
float32 whatever their dtype, and rounded once when they are stored.
"""
