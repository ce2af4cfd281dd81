"""Pooling: the maximum, minimum or mean of the elements in a sliding window, over [batch..., spatial..., channels]."""

from distaff.frontend.layers.pooling import Padding as Padding
from distaff.frontend.layers.pooling import avg_pool as avg_pool
from distaff.frontend.layers.pooling import max_pool as max_pool
from distaff.frontend.layers.pooling import min_pool as min_pool
from distaff.frontend.layers.pooling import pool as pool
