"""What driver addresses mean: the columns of a region table. Plain, no numba.

A region table is uint64[n, 5] of this process: address of the driver (guest-physical, or I/O virtual when an IOMMU
translates), size in bytes, address here, front-end user address, permissions; its rows are sorted by the first column
and do not overlap.
"""

GPA = 0
SIZE = 1
ADDRESS = 2
UVA = 3
ACCESS = 4
COLUMNS = 5
