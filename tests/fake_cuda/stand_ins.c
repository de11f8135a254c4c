/* What torch's CUDA build asks of the driver, answered on a machine without one.
 *
 * Built twice: as libcuda.so.1, and as a library that is loaded before torch, whose device_count
 * is taken in the place of torch's. */

int cuInit(unsigned flags) { return 100; /* CUDA_ERROR_NO_DEVICE */ }

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}

/* Devices that the autograd engine sees; fake_device.py sets it for a backward pass. */
int fake_device_count = 0;

signed char _ZN3c104cuda12device_countEv(void) { return fake_device_count; }
