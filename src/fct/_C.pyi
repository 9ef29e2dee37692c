"""Types of the compiled kernels. Addresses are ints; sizes and strides count elements."""

version: str
cuda_why_not: str

def first_nonfinite_row(data: int, dtype: int, n: int, d: int, row_stride: int) -> int: ...
def nonfinite_rows(data: int, dtype: int, n: int, d: int, row_stride: int, flags: int) -> int: ...
