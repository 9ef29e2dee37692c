// A stand-in for the driver's libcuda.so.1 with no GPU behind it. The CUDA runtime, which opens it when it is first
// asked, then goes through what a machine with a driver and no usable device gives: STAND_IN_VERSION is what
// cuDriverGetVersion reports, STAND_IN_INIT what cuInit returns (a CUresult).
#include <stdlib.h>
#include <string.h>

static int asked(const char* name, int otherwise) {
    const char* value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int cuInit(unsigned flags) { return flags ? 1 : asked("STAND_IN_INIT", 100); }

int cuDriverGetVersion(int* version) {
    *version = asked("STAND_IN_VERSION", 99000);
    return 0;
}

static int unknown(void) { return 999; }

int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* found) {
    *function = (void*)unknown;
    if (strcmp(name, "cuInit") == 0) *function = (void*)cuInit;
    if (strcmp(name, "cuDriverGetVersion") == 0) *function = (void*)cuDriverGetVersion;
    if (strcmp(name, "cuGetProcAddress") == 0) *function = (void*)cuGetProcAddress_v2;
    if (found) *found = 0;
    return (void)version, (void)flags, 0;
}
