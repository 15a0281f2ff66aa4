/* A few threads that compute one loop at a time, and share a machine's cores with other local workers. */
#ifndef DIPTYCH_THREADS_H
#define DIPTYCH_THREADS_H

/* Work item `index` of a loop. `thread` is 0 for the caller, 1 ... for the helpers: an index of scratch memory. */
typedef void (*work_item)(void *arg, int index, int thread);

/* Run the work items 0 .. count - 1, begun in this order, on the calling thread and every helper that has a core.
 * Returns when all are done. Of two callers at once the second one has no helpers. */
void parallel(int count, work_item run, void *arg);

/* The caller and its helpers. */
int num_threads(void);

#endif
