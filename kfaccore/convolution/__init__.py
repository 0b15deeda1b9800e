"""What a convolution's inputs need: windows over images, patches that stay folded, and the A factor by FFT.

`window` lays patches out as rows, `patches` keeps the image instead, `phases` turns strides and dilations into stride-1
convolutions of smaller images, `autocorrelation` takes the Gram matrix of their patches without unfolding them.
"""
