"""Fast paths of the encoder, each equal to the plain `med3dvlm.model.dcformer` by test.

`choice` decides which one a call takes, `stem` holds the algebra of the stem, `inference` and `training` are the paths,
`native` are kernels in C++ that they call where there is a compiler.
"""
