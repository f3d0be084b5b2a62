// Threads from the OpenMP runtime that is in the process already, torch's. Linking a second one
// would give two pools that fight for the cores, so its entry point is looked up at run time.
#pragma once

// Path of that runtime; empty if there is none, and everything then runs on the calling thread.
const char* kd_openmp_library();

// Whether a parallel call may be made: a runtime was found, and this process is not the child of
// a fork, which has inherited a pool without its threads.
bool kd_can_parallel();

// Calls fn(argument) on up to `threads` threads at once and waits for them.
void kd_parallel(int threads, void (*fn)(void*), void* argument);
