import numpy

RUN_DTYPE: numpy.dtype
