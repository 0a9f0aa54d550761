/* The trainer's heap for tensors: large blocks are mapped one by one, kept whole when they are freed, and given to the
 * next tensor of their size. Preloaded into the trainer (LD_PRELOAD); `slim_core/tensor_heap.py` steers it.
 *
 * glibc has two ways for a block of a megabyte, and both cost a trainer dearly: from a heap, where blocks that come and
 * go leave holes as large as all that lives between them; or mapped, where the kernel zeroes every page at every step.
 * Here a block has no holes and is not zeroed twice. What is idle is the price, and the plan limits it
 * (docs/decisions/0008-the-tensor-heap.md): at the limit an idle block is split, or grown by mremap(2), which moves its
 * pages without touching them, and what is still too much goes back to the system.
 *
 * Answered from here are posix_memalign, with which torch asks for a tensor, and malloc, with which MKL asks for the buffers
 * of a matrix product (it gives them back at once under MKL_DISABLE_FAST_MM); both only from THRESHOLD on, all else is
 * glibc's. Every entry point that may be handed one of our blocks knows them by address.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#define PAGE ((size_t)4096)
#define THRESHOLD ((size_t)64 << 10) /* as in worker/environment.py, for glibc where this library is not there */
#define HUGE_PAGE ((size_t)2 << 20)

extern void *__libc_memalign(size_t alignment, size_t size);
extern void *__libc_realloc(void *block, size_t size);
extern void *__libc_malloc(size_t size);
extern void __libc_free(void *block);

struct block {
  char *start; /* NULL: no block here */
  size_t size; /* whole pages */
  size_t rest; /* its place among the idle ones, or IN_USE */
};
#define IN_USE SIZE_MAX

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *blocks; /* a hash table by address, open addressing, its capacity a power of two */
static char **idle;          /* the starts of the idle ones, as many as the table has places */
static size_t capacity, count, idle_count;
static size_t limit = SIZE_MAX; /* of mapped bytes; only what is idle can be given up for it */
static size_t mapped, live, peak_live;
static size_t (*libc_usable_size)(void *);
static int working; /* from the constructor on, and only where pages are as large as is assumed here */

static size_t home(const char *start) { return ((uintptr_t)start / PAGE * 0x9E3779B97F4A7C15u) >> 20 & (capacity - 1); }

static struct block *find(const char *start) {
  if (!capacity) return NULL;
  for (size_t i = home(start);; i = (i + 1) & (capacity - 1)) {
    if (!blocks[i].start) return NULL;
    if (blocks[i].start == start) return &blocks[i];
  }
}

static struct block *place(struct block block) {
  size_t i = home(block.start);
  while (blocks[i].start) i = (i + 1) & (capacity - 1);
  blocks[i] = block;
  return &blocks[i];
}

static void *pages(size_t size) {
  void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? NULL : start;
}

/* Room for two more (a block may be split), at most half full. The tables are mapped as well, so that they never enter themselves. */
static int reserve(void) {
  if (2 * (count + 2) <= capacity) return 1;
  size_t old_capacity = capacity, new_capacity = capacity ? 2 * capacity : 1024;
  struct block *old = blocks, *fresh = pages(new_capacity * sizeof *fresh);
  char **fresh_idle = pages(new_capacity * sizeof *fresh_idle);
  if (!fresh || !fresh_idle) {
    if (fresh) munmap(fresh, new_capacity * sizeof *fresh);
    if (fresh_idle) munmap(fresh_idle, new_capacity * sizeof *fresh_idle);
    return 0;
  }
  blocks = fresh;
  capacity = new_capacity;
  for (size_t i = 0; i < old_capacity; i++)
    if (old[i].start) place(old[i]);
  if (old) {
    memcpy(fresh_idle, idle, idle_count * sizeof *idle);
    munmap(old, old_capacity * sizeof *old);
    munmap(idle, old_capacity * sizeof *idle);
  }
  idle = fresh_idle;
  return 1;
}

static void lay_aside(struct block *block) {
  block->rest = idle_count;
  idle[idle_count++] = block->start;
}

static void take_up(struct block *block) {
  char *last = idle[--idle_count];
  idle[block->rest] = last;
  find(last)->rest = block->rest;
  block->rest = IN_USE;
}

/* Out of the table; what follows it in its run moves up, as deletion from open addressing wants. */
static void forget(struct block *gone) {
  size_t hole = gone - blocks;
  for (size_t i = (hole + 1) & (capacity - 1); blocks[i].start; i = (i + 1) & (capacity - 1)) {
    size_t wanted = home(blocks[i].start);
    if (((i - wanted) & (capacity - 1)) >= ((i - hole) & (capacity - 1))) {
      blocks[hole] = blocks[i];
      hole = i;
    }
  }
  blocks[hole].start = NULL;
  count--;
}

static struct block *add(char *start, size_t size) {
  count++;
  return place((struct block){start, size, IN_USE});
}

/* A block that is in nobody's use and not among the idle ones any more. */
static void unmap(struct block *block) {
  munmap(block->start, block->size);
  mapped -= block->size;
  forget(block);
}

/* The idle block that fits best: of `size`, else the smallest larger one, else the largest of all. */
static struct block *best_idle(size_t size) {
  struct block *best = NULL;
  for (size_t i = 0; i < idle_count; i++) {
    struct block *b = find(idle[i]);
    if (b->size == size) return b;
    if (!best || (b->size > size ? best->size < size || b->size < best->size : best->size < size && b->size > best->size))
      best = b;
  }
  return best;
}

/* Give idle blocks back, the largest first, until `wanted` more bytes stay below the limit or nothing is idle. */
static void make_room(size_t wanted) {
  while (idle_count && (mapped > limit || wanted > limit - mapped)) {
    struct block *largest = best_idle(SIZE_MAX);
    take_up(largest);
    unmap(largest);
  }
}

/* Make the pages of a large tensor in one go: they will all be written. Smaller blocks may be what they are not for, like
 * the 256 KiB that oneDNN reserves for every kernel of a few. */
static void populate(char *start, size_t size, size_t present) {
  int before = errno;
  if (size >= HUGE_PAGE) {
    madvise(start, size, MADV_HUGEPAGE); /* all of it: with two kinds of advice the kernel would see two mappings */
#ifdef MADV_POPULATE_WRITE
    if (size > present) madvise(start + present, size - present, MADV_POPULATE_WRITE);
#endif
  }
  errno = before;
}

static struct block *map(size_t size, int all) {
  char *start = pages(size);
  if (!start) return NULL;
  if (all) populate(start, size, 0);
  mapped += size;
  return add(start, size);
}

/* A block in another size, its pages moved and not copied; NULL where the system refuses, and it is as it was. */
static struct block *resize(struct block *block, size_t size, int all) {
  struct block old = *block;
  char *start = mremap(old.start, old.size, size, MREMAP_MAYMOVE);
  if (start == MAP_FAILED) return NULL;
  forget(block);
  if (all && size > old.size) populate(start, size, old.size);
  mapped += size - old.size;
  return add(start, size);
}

/* The first `size` bytes of a larger block; the rest is idle. */
static struct block *split(struct block *block, size_t size) {
  size_t rest = block->size - size;
  if (rest < THRESHOLD) return resize(block, size, 0);
  block->size = size;
  char *start = block->start;
  lay_aside(add(start + size, rest));
  return find(start);
}

/* An idle block of this size, else a new one; at the limit, or where the system has no more, out of what is idle. */
static struct block *take(size_t size, int all) {
  struct block *best = best_idle(size), *taken;
  int fits = mapped <= limit && size <= limit - mapped;
  if (best && (best->size == size || !fits)) {
    char *start = best->start;
    take_up(best);
    if (best->size == size) return best;
    if (best->size < size) make_room(size - best->size);
    best = find(start); /* the table may have moved it */
    if ((taken = best->size > size ? split(best, size) : resize(best, size, all))) return taken;
    unmap(best);
  }
  while (!(taken = map(size, all)) && idle_count) make_room(SIZE_MAX);
  return taken;
}

static void *allocate(size_t size, int all) {
  void *start = NULL;
  size = (size + PAGE - 1) & ~(PAGE - 1);
  pthread_mutex_lock(&lock);
  struct block *block = reserve() ? take(size, all) : NULL;
  if (block) {
    live += size;
    if (live > peak_live) peak_live = live;
    start = block->start;
  }
  pthread_mutex_unlock(&lock);
  return start;
}

/* Size of a block of ours; 0 for any other pointer. Ours begin with a page, which few others do. */
static size_t size_of(void *start) {
  if ((uintptr_t)start % PAGE || !start) return 0;
  pthread_mutex_lock(&lock);
  struct block *block = find(start);
  size_t size = block && block->rest == IN_USE ? block->size : 0;
  pthread_mutex_unlock(&lock);
  return size;
}

static int release(void *start) {
  int ours = 0, before = errno;
  pthread_mutex_lock(&lock);
  struct block *block = find(start);
  if (block && block->rest == IN_USE) {
    ours = 1;
    live -= block->size;
    if (mapped > limit)
      unmap(block);
    else
      lay_aside(block);
  }
  pthread_mutex_unlock(&lock);
  errno = before;
  return ours;
}

PUBLIC int posix_memalign(void **out, size_t alignment, size_t size) {
  if (alignment % sizeof(void *) || !alignment || alignment & (alignment - 1)) return EINVAL;
  int before = errno;
  int is_ours = working && size >= THRESHOLD && alignment <= PAGE && size <= PTRDIFF_MAX;
  void *start = is_ours ? allocate(size, 1) : __libc_memalign(alignment, size);
  errno = before;
  if (!start) return ENOMEM;
  *out = start;
  return 0;
}

PUBLIC void *malloc(size_t size) {
  int is_ours = working && size >= THRESHOLD && size <= PTRDIFF_MAX;
  void *start = is_ours ? allocate(size, 0) : __libc_malloc(size);
  if (!start) errno = ENOMEM;
  return start;
}

PUBLIC void free(void *block) {
  if (block && (uintptr_t)block % PAGE == 0 && release(block)) return;
  __libc_free(block);
}

/* A block of ours in another size where that takes no second one; NULL if it would, or `size` is small. */
static void *in_place(char *start, size_t size) {
  void *resized = NULL;
  if (size < THRESHOLD || size > PTRDIFF_MAX) return NULL;
  size = (size + PAGE - 1) & ~(PAGE - 1);
  pthread_mutex_lock(&lock);
  if (reserve()) {
    struct block *block = find(start);
    size_t before = block->size;
    if (size != before) block = size < before ? split(block, size) : resize(block, size, 0);
    if (block) {
      resized = block->start;
      live += size - before;
      if (live > peak_live) peak_live = live;
    }
  }
  pthread_mutex_unlock(&lock);
  return resized;
}

PUBLIC void *realloc(void *block, size_t size) {
  size_t old = size_of(block);
  if (!old) return __libc_realloc(block, size);
  void *start = in_place(block, size);
  if (start) return start;
  start = size ? malloc(size) : NULL;
  if (start) memcpy(start, block, old < size ? old : size);
  if (start || !size) free(block);
  return start;
}

PUBLIC void *reallocarray(void *block, size_t number, size_t size) {
  size_t bytes;
  if (__builtin_mul_overflow(number, size, &bytes)) {
    errno = ENOMEM;
    return NULL;
  }
  return realloc(block, bytes);
}

PUBLIC size_t malloc_usable_size(void *block) {
  size_t size = size_of(block);
  return size ? size : libc_usable_size(block);
}

/* Bytes that may be mapped before idle blocks are given up; live tensors may exceed it. */
PUBLIC void tensor_heap_set_limit(size_t bytes) {
  pthread_mutex_lock(&lock);
  limit = bytes;
  make_room(0);
  pthread_mutex_unlock(&lock);
}

/* Bytes: mapped now, in use now, most in use since the last call with `restart`. */
PUBLIC void tensor_heap_read(size_t out[3], int restart) {
  pthread_mutex_lock(&lock);
  out[0] = mapped;
  out[1] = live;
  out[2] = peak_live;
  if (restart) peak_live = live;
  pthread_mutex_unlock(&lock);
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }

__attribute__((constructor)) static void start(void) {
  *(void **)&libc_usable_size = dlsym(RTLD_NEXT, "malloc_usable_size");
  pthread_atfork(before_fork, after_fork, after_fork);
  working = sysconf(_SC_PAGESIZE) == (long)PAGE;
}
