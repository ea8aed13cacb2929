// Stands for CUDA's driver in tests of expert_store/paging/driver.py: allocations are files in memory, mapped by the
// system. Arguments that the real driver would refuse, and a second mapping of one allocation, are refused.

#define _GNU_SOURCE
#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GRANULARITY = 1 << 16, MOST = 16 };

static int files[MOST], num_created, num_held;
static CUdeviceptr mapped[MOST];

int held(void) { return num_held; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED && device == 0;
    return CUDA_SUCCESS;
}

static int is_known(const CUmemAllocationProp *properties) {
    return properties->type == CU_MEM_ALLOCATION_TYPE_PINNED && properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE
        && properties->location.id == 0 && properties->requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE
        && !properties->allocFlags.compressionType && !properties->allocFlags.usage;
}

CUresult cuMemGetAllocationGranularity(
    size_t *size, const CUmemAllocationProp *properties, CUmemAllocationGranularity_flags option
) {
    *size = GRANULARITY;
    return is_known(properties) && option == CU_MEM_ALLOC_GRANULARITY_MINIMUM ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(
    CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties, unsigned long long flags
) {
    if (num_created == MOST)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (!is_known(properties) || size != GRANULARITY || flags)
        return CUDA_ERROR_INVALID_VALUE;
    files[num_created] = memfd_create("frame", 0);
    if (ftruncate(files[num_created], size))
        return CUDA_ERROR_UNKNOWN;
    *handle = ++num_created;
    num_held++;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    num_held--;
    return close(files[handle - 1]) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult map(CUdeviceptr at, size_t size, int kind, int file) {
    void *got = mmap((void *)at, size, PROT_NONE, kind, file, 0);
    return got == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *at, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags) {
    *at = (CUdeviceptr)mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return size % GRANULARITY || alignment || wish || flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
    return munmap((void *)at, size) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemMap(
    CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags
) {
    if (!handle || handle > MOST || mapped[handle - 1] || size != GRANULARITY || offset || flags)
        return CUDA_ERROR_INVALID_VALUE;
    mapped[handle - 1] = at;
    return map(at, size, MAP_SHARED | MAP_FIXED, files[handle - 1]);
}

CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc *access, size_t count) {
    if (count != 1 || access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE || access->location.id != 0
        || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return CUDA_ERROR_INVALID_VALUE;
    return mprotect((void *)at, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
    for (int handle = 0; handle < MOST; handle++)
        if (mapped[handle] == at) {
            mapped[handle] = 0;
            return map(at, size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1);
        }
    return CUDA_ERROR_INVALID_VALUE;
}
