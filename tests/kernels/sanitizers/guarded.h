// n values whose last byte is the last before an unreadable page, as at the end of an exactly mapped file.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

template <class T>
class Guarded {
  public:
    explicit Guarded(size_t n) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = n * sizeof(T);
        size_ = (bytes + page - 1) / page * page + page;
        start_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start_ == MAP_FAILED) std::abort();
        char* const guard = static_cast<char*>(start_) + size_ - page;
        if (mprotect(guard, page, PROT_NONE) != 0) std::abort();
        data = reinterpret_cast<T*>(guard - bytes);
    }
    ~Guarded() { munmap(start_, size_); }
    Guarded(const Guarded&) = delete;
    T* data;

  private:
    void* start_;
    size_t size_;
};
