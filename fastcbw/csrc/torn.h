/* Copies that may tear, by the contract of who makes them: the thread sanitizer is not to look at them.
   It reports a suppressed race anyway, word by word, only to find it suppressed: a disk in memory would take it minutes for a megabyte. */
#ifndef FASTCBW_TORN_H
#define FASTCBW_TORN_H

#ifdef __SANITIZE_THREAD__
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);

static inline void fcbw_torn_begin(void)
{
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

static inline void fcbw_torn_end(void)
{
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
static inline void fcbw_torn_begin(void) {}
static inline void fcbw_torn_end(void) {}
#endif

#endif
