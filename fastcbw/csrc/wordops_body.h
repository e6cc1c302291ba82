/* The loops of wordops.h for one instruction set. No include guard: see there for the macros, which end with this file. */

static TARGET FCBW_RACY int64_t FN(skip_zeroes)(const uint64_t *p, int64_t word, int64_t end)
{
    while (word + 8 <= end && !OR8(p + word))
        word += 8;
    while (word < end && p[word] == 0)
        word++;
    return word;
}

static TARGET FCBW_RACY int64_t FN(skip_ones)(const uint64_t *p, int64_t word, int64_t end)
{
    while (word + 8 <= end && !NOT_ONES8(p + word))
        word += 8;
    while (word < end && p[word] == ~(uint64_t)0)
        word++;
    return word;
}

static TARGET FCBW_RACY void FN(and_not)(uint64_t *target, const uint64_t *left, const uint64_t *right, int64_t words)
{
    int64_t i = 0;
#ifdef STREAMS
    if (words >= FCBW_STREAM_WORDS && target != left && target != right) {
        for (; ((uintptr_t)(target + i) & 63) != 0; i++)
            target[i] = left[i] & ~right[i];
        for (; i + 8 <= words; i += 8) {
            _mm256_stream_si256((__m256i *)(target + i), _mm256_andnot_si256(FCBW_LOAD4(right + i), FCBW_LOAD4(left + i)));
            _mm256_stream_si256((__m256i *)(target + i + 4), _mm256_andnot_si256(FCBW_LOAD4(right + i + 4), FCBW_LOAD4(left + i + 4)));
        }
        _mm_sfence();
    }
#endif
    for (; i < words; i++)
        target[i] = left[i] & ~right[i];
}

static TARGET FCBW_RACY void FN(or_into)(uint64_t *target, const uint64_t *source, int64_t words)
{
    int64_t i;
    for (i = 0; i < words; i++)
        target[i] |= source[i];
}

/* One pass. `bits` is what of word w is still to be looked at; `mask` says which words of base..next, after w, are not
 * zero. Finding the next word by its bit in the mask instead of by a loop saves a mispredicted branch or two at each run. */
static TARGET FCBW_RACY int64_t FN(runs)(const uint64_t *p, int64_t first, int64_t end, struct fcbw_run *out, int64_t room,
                                         int64_t *resume)
{
    const int64_t last = (end - 1) >> 6;                                /* the one word that may end before its bit 63 */
    const uint64_t last_mask = ~(uint64_t)0 >> (63 - ((end - 1) & 63));
    int64_t n = 0, w = first >> 6, base = w, next = w + 1, stop = first;
    uint64_t bits = p[w] & (~(uint64_t)0 << (first & 63)), mask = 0, rest;

    if (w == last)
        bits &= last_mask;
    while (n < room) {
        if (bits == 0) {
            while (mask == 0 && next < last) {
                base = next;
                if (last - base >= 64) {
                    mask = MASK64(p + base);
                    next += 64;
                } else {
                    for (; next < last; next++)
                        mask |= (uint64_t)(p[next] != 0) << (next - base);
                }
            }
            if (mask != 0) {
                w = base + __builtin_ctzll(mask);
                mask &= mask - 1;
                bits = p[w];
            } else if (w < last) {
                w = last;
                bits = p[w] & last_mask;
            } else {
                stop = end;
                break;
            }
            if (bits == 0)                  /* cleared meanwhile, or the last word has none */
                continue;
        }
        out[n].first = w * 64 + __builtin_ctzll(bits);
        rest = bits + (bits & -bits);       /* 0011_0110 + 10 = 0011_1000: the carry runs through the run to its end */
        if (rest != 0) {
            stop = w * 64 + __builtin_ctzll(rest);
            bits &= rest;
        } else if (w == last) {             /* out of the top of the word: the run goes on in the next ones */
            stop = end;
            bits = 0;
        } else {
            w = FN(skip_ones)(p, w + 1, last);
            bits = p[w];
            if (w == last)
                bits &= last_mask;
            rest = bits + 1;                /* the same with the run starting at bit 0 */
            stop = w * 64 + (rest ? __builtin_ctzll(rest) : 64);
            bits &= rest;
            if (w < next) {
                mask &= (~(uint64_t)0 << (w - base)) << 1;
            } else {
                mask = 0;
                next = w + 1;
            }
        }
        out[n].count = stop - out[n].first;
        n++;
    }
    *resume = stop;
    return n;
}

#undef FN
#undef TARGET
#undef OR8
#undef NOT_ONES8
#undef MASK64
#undef STREAMS
