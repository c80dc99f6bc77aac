// Threads that stay awake while one program runs, so that its many short parallel regions need no waking.
#pragma once

#include <cstdint>

namespace biasloss {

// While one lives, `team_shares` on this thread hands work to the team. Only one can have the team: another thread that
// asks for it meanwhile gets none and works on torch's threads, as everything outside of a program does.
class TeamSession {
 public:
  explicit TeamSession(int64_t threads);
  ~TeamSession();
  TeamSession(const TeamSession&) = delete;
  TeamSession& operator=(const TeamSession&) = delete;

 private:
  bool has_team_;
};

// Threads of the session of this thread, itself included; 0 without one. 1 within a share, which is not cut further.
int64_t team_size();

// Calls call(body, share) for every share in [0, shares), on the threads of the session. Whoever is free takes the next
// share: the caller waits for those only that a thread has begun. Rethrows what a share throws.
void team_shares(int64_t shares, void (*call)(const void* body, int64_t share), const void* body);

}  // namespace biasloss
