/* Preloaded into a process: every aligned allocation, such as those of tensors, ends at a page that cannot be accessed,
 * or begins behind one (GUARD_PAGES=start). Unlike a sanitizer this sees all code, compiled at run time or years ago.
 * New memory is filled with bytes that are NaN in every floating-point type. What alignment leaves between an
 * allocation and its page is checked when it is freed; freed memory cannot be accessed until thousands of later
 * allocations. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
#define SLOTS (1u << 20)
#define FREED 4096
#define UNTOUCHED ((char)0xA5)
#define NOT_A_NUMBER 0xFF

extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* pointer);

typedef struct {
  char* mapped; /* a page that cannot be accessed, `room` bytes, and another such page */
  size_t room;
  char* start; /* NULL in a slot that was never used; `removed` in one that may be used again */
  size_t size;
} Allocation;

static Allocation slots[SLOTS], freed[FREED];
static unsigned oldest;
static char removed[1];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static Allocation* slot_of(const void* start, int empty) {
  unsigned slot = (unsigned)(((uintptr_t)start >> 4) * 0x9E3779B97F4A7C15ull >> 44);
  while (slots[slot].start != NULL && slots[slot].start != start && !(empty && slots[slot].start == removed)) {
    slot = (slot + 1) % SLOTS;
  }
  return &slots[slot];
}

static void* allocate(size_t alignment, size_t size) {
  size_t room = (size + PAGE - 1) / PAGE * PAGE;
  char* mapped = mmap(NULL, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped + PAGE, room, PROT_READ | PROT_WRITE) != 0) {
    fputs("guard pages: out of mappings\n", stderr);
    abort();
  }
  const char* side = getenv("GUARD_PAGES");
  size_t before = side != NULL && strcmp(side, "start") == 0 ? 0 : (room - size) / alignment * alignment;
  Allocation made = {mapped, room, mapped + PAGE + before, size};
  memset(mapped + PAGE, UNTOUCHED, room);
  memset(made.start, NOT_A_NUMBER, size);
  pthread_mutex_lock(&mutex);
  *slot_of(made.start, 1) = made;
  pthread_mutex_unlock(&mutex);
  return made.start;
}

static void check(const Allocation* allocation) {
  const char* end = allocation->mapped + PAGE + allocation->room;
  for (const char* at = allocation->mapped + PAGE; at < end; ++at) {
    int outside = at < allocation->start || at >= allocation->start + allocation->size;
    if (outside && *at != UNTOUCHED) {
      fprintf(stderr, "guard pages: written at offset %td of %zu bytes\n", at - allocation->start, allocation->size);
      abort();
    }
    if (at == allocation->start && allocation->size > 0) {
      at += allocation->size - 1;
    }
  }
}

int posix_memalign(void** pointer, size_t alignment, size_t size) {
  *pointer = size == 0 || alignment > PAGE ? __libc_memalign(alignment, size)
                                           : allocate(alignment < 16 ? 16 : alignment, size);
  return *pointer == NULL ? ENOMEM : 0;
}

void* memalign(size_t alignment, size_t size) {
  void* pointer = NULL;
  return posix_memalign(&pointer, alignment, size) == 0 ? pointer : NULL;
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

void free(void* pointer) {
  if (pointer == NULL) {
    return;
  }
  pthread_mutex_lock(&mutex);
  Allocation *slot = slot_of(pointer, 0), found = *slot;
  if (found.start != NULL) {
    slot->start = removed;
    check(&found);
    madvise(found.mapped, found.room + 2 * PAGE, MADV_DONTNEED);
    mprotect(found.mapped, found.room + 2 * PAGE, PROT_NONE);
    Allocation* last = &freed[oldest++ % FREED];
    if (last->mapped != NULL) {
      munmap(last->mapped, last->room + 2 * PAGE);
    }
    *last = found;
  }
  pthread_mutex_unlock(&mutex);
  if (found.start == NULL) {
    __libc_free(pointer);
  }
}
