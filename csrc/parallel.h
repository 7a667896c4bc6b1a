// The only file that other code needs to know of threads.
#pragma once
#include <cstdint>

namespace microscale {

// Calls run(context, unit, thread) once for every unit in [0, units), on at most `threads` threads, the calling one
// among them, and returns when all are done. 0 <= thread < threads. Each thread takes its own number and every
// threads-th after it, in ascending order, so that it can fetch ahead what it reads next. Then it takes over the later
// half of what the thread has left that has most, and so on. Units are begun one by one: a thread which the operating
// system takes off its core holds up one unit and no more. Fewer than 2^27 units a thread.
// Waiting threads spin for some microseconds and then sleep. Calls from several threads are served one after another;
// calls from within `run` are not allowed. After a fork the child starts threads of its own.
void parallel(int threads, int64_t units, void (*run)(void *context, int64_t unit, int thread), void *context);

}  // namespace microscale
