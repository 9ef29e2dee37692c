# One file per op and instruction set; each is compiled with its own flags and chosen at run time.
set(FCT_CPU_SOURCES csrc/cpu/rows.cpp)
