#include "parallel.h"

#include <atomic>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace {

// GCC's OpenMP entry point, which LLVM's and Intel's runtimes offer too.
typedef void (*GompParallel)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};

struct Runtime {
  GompParallel parallel = nullptr;
  const char* path = "";

  Runtime() {
#if defined(__linux__) || defined(__APPLE__)
    // torch loads its OpenMP runtime globally (libtorch_global_deps), so the name resolves.
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    Dl_info info;
    if (symbol && dladdr(symbol, &info)) {
      parallel = reinterpret_cast<GompParallel>(symbol);
      path = info.dli_fname;
      pthread_atfork(nullptr, nullptr, [] { forked = true; });
    }
#endif
  }
};

const Runtime& runtime() {
  static const Runtime found;
  return found;
}

}  // namespace

const char* kd_openmp_library() { return runtime().path; }

bool kd_can_parallel() { return runtime().parallel && !forked; }

void kd_parallel(int threads, void (*fn)(void*), void* argument) {
  runtime().parallel(fn, argument, static_cast<unsigned>(threads), 0);
}
