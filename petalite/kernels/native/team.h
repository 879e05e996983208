// A team of threads that share one piece of work, and share the machine with others.
//
// The caller is worker 0. Work is cut finely; each worker takes the pieces of its own share in order, which memory likes,
// and then what is left of the others', so that a thread that the system took its core from holds up only the piece it
// was at. Who waits spins for microseconds and then sleeps; once a thread finds that another program has its core, all
// sleep at once, for a while.
#pragma once

#include <cstddef>
#include <cstdint>

namespace petalite {

class Team;

class Worker {
  public:
    const int index, count;  // 0 ≤ index < count

    Worker(Team& team, int index, int count) : index(index), count(count), team_(team) {}

    // Waits until every worker of the team came here; what they wrote before is seen after.
    void barrier();

    // Calls f(begin, end) over pieces of [0, n) of `grain` each (the last may be shorter), every piece once, by
    // whichever worker is free. All workers of the team come here with the same n and grain; ends with a barrier.
    template <typename F>
    void share(int64_t n, int64_t grain, F&& f) {
        if (count == 1) {
            if (n > 0) f(int64_t(0), n);
            return;
        }
        const int64_t n_pieces = (n + grain - 1) / grain;
        for (int i = 0; i < count; ++i) {
            const int whose = (index + i) % count;
            const int64_t first = n_pieces * whose / count, after = n_pieces * (whose + 1) / count;
            for (int64_t piece; (piece = first + take(whose)) < after;)
                f(piece * grain, (piece + 1) * grain < n ? (piece + 1) * grain : n);
        }
        barrier();
    }

    // Memory of this worker alone, 64-byte aligned, kept from call to call; grows, and then forgets its contents.
    void* local(size_t bytes);

  private:
    int64_t take(int whose);
    Team& team_;
};

// Runs job(worker, context) once on every worker and returns when all have. Calls from several threads take turns.
void team_run(Team* team, void (*job)(Worker&, void*), void* context);

int team_size(const Team* team);

}  // namespace petalite
