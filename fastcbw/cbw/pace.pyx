"""The pace of a job: bytes in flight that fit its target, a rate, and the guest's needs.

    worker:  take ─▶ ( next piece ─▶ ( step ─▶ read_begin ─ read ─ read_end ─▶ write ─▶ moved )* ─▶ again )* ─▶ give

Bytes in flight. More of them help until the target's latency is hidden; from then on they only wait in a queue, cost memory, delay a
cancel and stand in front of the guest where it shares the queue. So the job begins with one worker, and climbs: four times as many bytes in
flight as long as a round shows nearly as many times the throughput for it, twice as many while it shows some, and back where it was too far. A
round of the climb lasts about one latency of the target: from the change of the level until as many pieces have ended as began with it, so
that few bytes are moved before the target's latency is hidden. Then the job stays, and now and then tries one level up (kept when it gains) and
one down (kept when it loses nothing). Workers above the level sleep.

A target with a buffer takes the first bytes faster than it will take the rest, and a climb believes it. So no step goes beyond some times what
the throughput so far moves in the shortest time that a piece took lately: latency x bandwidth, counted in pieces (Little's law), where a piece
that waited in the target's queue does not count as latency. And a job that holds far more than that under way tries soon how it fares with
less. A piece that takes long is halved, so that a slow target is not given more than PIECE_NS of work at a time.

A target that is worth many bytes in flight is worth large writes, too: gather() says how long a short piece may be made by its neighbours.

Rate. A token bucket in the form of a due time: a piece pushes it by length / rate, and nobody begins before it. It may lag by BURST_NS,
so that a pause in the work is not made up for in one go. The lower one of the user's and the guest's counts.

Everything is under one mutex, taken a few times for each step of many KiB. A worker that sleeps has no piece, so nothing is left behind.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.sync cimport (cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
                           pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)

cdef enum:
    CLIMB = 0                   # twice or four times as much at a time
    HOLD = 1
    PROBE_UP = 2
    PROBE_DOWN = 3

    PIECE_MIN = 4096
    SKIP_ROUNDS = 10            # rounds between two probes
    EXCESS_ROUNDS = 2           # ... where far more is under way than the target's latency asks for

cdef int64_t ROUND_NS = 50000000
cdef int64_t ROUND_MAX_NS = 250000000    # of a held level, where its pieces take long
cdef int64_t CLIMB_NS = 25000000
cdef int64_t WINDOW_NS = 1000000000      # how long a shortest time counts: twice this at most
cdef int64_t PIECE_NS = 200000000
cdef int64_t BURST_NS = 50000000
cdef double CLIMB_GAIN = 1.15   # a step of the climb has to give at least this
cdef double STEEP_GAIN = 0.7    # this part of what a step could give at most, or more: the next step is four times as much
cdef int CLIMB_FLIGHT = 4       # times latency x bandwidth: no step of the climb or probe goes beyond
cdef int HOLD_FLIGHT = 2        # ... that is kept under way where it is enough
cdef double UP_GAIN = 1.06      # one level more, about a quarter
cdef double DOWN_LOSS = 0.97
cdef double EXCESS_LOSS = 0.9   # of a large step down: one round of it is compared with one of before


cdef class Pace:
    """Made by a job, shared by its workers; the setters are for any thread.

    levels: (workers, piece) in ascending order of their product; one level: no adapting. first: index of the level to begin with; levels
    below it have smaller pieces, for targets that take long for one.
    """

    def __cinit__(self, levels, int first=0):
        cdef int i
        levels = list(levels)
        if not 1 <= len(levels) <= LEVELS_MAX or not 0 <= first < len(levels):
            raise ValueError(f"pace: {len(levels)} levels, the first being {first}: 1 to {LEVELS_MAX} are possible")
        for i, (workers, piece) in enumerate(levels):
            if workers < 1 or piece < PIECE_MIN or piece % PIECE_MIN:
                raise ValueError(f"pace: level of {workers} workers with {piece} bytes makes no sense")
            self.levels[i].workers = workers
            self.levels[i].piece = piece
            self.workers_max = max(self.workers_max, workers)
            self.piece_max = max(self.piece_max, piece)
        self.levels_count = len(levels)
        self.level = self.best_level = self.first = first
        self.phase = CLIMB if len(levels) > 1 else HOLD
        self.probe_up = True
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)
        cond_init(&self.free)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)
        pthread_cond_destroy(&self.changed)
        pthread_cond_destroy(&self.free)

    # -- workers

    cdef bint take(self) noexcept nogil:
        cdef bint go
        pthread_mutex_lock(&self.mutex)
        while not self.stopped and self.busy >= self.levels[self.level].workers:
            pthread_cond_wait(&self.free, &self.mutex)
        go = not self.stopped
        self.busy += go
        pthread_mutex_unlock(&self.mutex)
        return go

    cdef bint again(self) noexcept nogil:
        cdef bint stays
        pthread_mutex_lock(&self.mutex)
        stays = not self.stopped and self.busy <= self.levels[self.level].workers
        self.busy -= not stays          # nobody is woken: as many as may be are at work
        pthread_mutex_unlock(&self.mutex)
        return stays or self.take()

    cdef void give(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        self.busy -= 1
        if self.busy < self.levels[self.level].workers:
            pthread_cond_signal(&self.free)
        pthread_mutex_unlock(&self.mutex)

    cdef int64_t step(self, int64_t left) noexcept nogil:
        cdef int64_t now, length = 0
        cdef uint64_t rate
        pthread_mutex_lock(&self.mutex)
        while not self.cancelled:
            rate = self.rate_now()
            if self.paused:
                self.round_void = True
                pthread_cond_wait(&self.changed, &self.mutex)
                continue
            now = now_ns() if rate else 0
            if self.due_ns > now and rate:
                self.round_void = True
                cond_wait_until(&self.changed, &self.mutex, self.due_ns)
                continue
            if self.phase == CLIMB and self.round_ns == 0:
                self.begin_round(now_ns())      # the first piece of all; later ones begin with the level
            length = self.levels[self.level].piece
            if rate:
                while length > PIECE_MIN and <uint64_t>length > rate // 8:     # a low rate is a steady one, too
                    length = (length // 2 + PIECE_MIN - 1) // PIECE_MIN * PIECE_MIN
                length = min(length, left)
                if self.due_ns < now - BURST_NS:
                    self.due_ns = now - BURST_NS
                self.due_ns += <int64_t>(<double>length * 1e9 / <double>rate)
            break
        pthread_mutex_unlock(&self.mutex)
        return min(length, left)

    cdef void read_begin(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        while self.readers_limit and self.reading >= self.readers_limit and not self.cancelled:
            pthread_cond_wait(&self.changed, &self.mutex)
        self.reading += 1
        pthread_mutex_unlock(&self.mutex)

    cdef void read_end(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        self.reading -= 1
        if self.readers_limit:
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    cdef void moved(self, int64_t length, int64_t took_ns) noexcept nogil:
        cdef int64_t now
        if self.levels_count == 1:
            return
        pthread_mutex_lock(&self.mutex)
        now = now_ns()
        if now - self.window_ns > WINDOW_NS:
            self.shortest_before_ns = self.shortest_ns if self.window_ns else took_ns
            self.shortest_ns = took_ns
            self.window_ns = now
        self.shortest_ns = min(self.shortest_ns, took_ns)
        if self.to_skip > 0:
            self.to_skip -= 1
        elif self.round_ns == 0 or self.round_void:
            self.begin_round(now)
        else:
            self.round_bytes += length
            self.round_pieces += 1
            if self.round_is_over(now):
                self.judge(now)
                pthread_cond_broadcast(&self.free)
        pthread_mutex_unlock(&self.mutex)

    cdef void stop(self, bint at_once) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        self.stopped = True
        self.cancelled |= at_once
        pthread_cond_broadcast(&self.changed)
        pthread_cond_broadcast(&self.free)
        pthread_mutex_unlock(&self.mutex)

    # -- inside, with the mutex held

    cdef uint64_t rate_now(self) noexcept nogil:
        if self.rate == 0 or self.guest_rate == 0:
            return self.rate | self.guest_rate
        return min(self.rate, self.guest_rate)

    cdef void begin_round(self, int64_t now) noexcept nogil:
        self.round_ns = now
        self.round_bytes = 0
        self.round_pieces = 0
        self.round_void = False

    cdef bint round_is_over(self, int64_t now) noexcept nogil:
        if self.phase == CLIMB:
            return now - self.round_ns >= CLIMB_NS and self.round_pieces >= self.levels[self.level].workers
        if self.phase == HOLD and now - self.round_ns >= ROUND_MAX_NS:
            return True
        return now - self.round_ns >= ROUND_NS and self.round_pieces >= 2 * self.levels[self.level].workers

    cdef void go_to(self, int level) noexcept nogil:
        if level == self.level:
            self.begin_round(now_ns())
            return
        self.to_skip = self.busy - 1        # but for the worker that is judging: it has just ended a step
        self.level = level
        if self.phase == CLIMB:
            # What was under way is not counted, and slows the others down: a climb that gains nothing ends rather too early.
            self.begin_round(now_ns())
        else:
            self.round_ns = 0

    cdef void judge(self, int64_t now) noexcept nogil:
        """A round has ended: what does it say of the level?"""
        cdef double rate = <double>self.round_bytes * 1e9 / <double>(now - self.round_ns)
        cdef int level = self.level
        cdef double needed = <double>(self.round_pieces * min(self.shortest_ns, self.shortest_before_ns)) / <double>(now - self.round_ns)
        self.needed = needed * self.levels[level].piece
        if (now - self.round_ns) // self.round_pieces * self.levels[level].workers > PIECE_NS and self.levels[level].workers == 1 and level > 0:
            # Slower than a piece in PIECE_NS: smaller ones, at once.
            self.phase = HOLD
            self.best_level = level - 1
            self.best_rate = rate
            self.go_to(level - 1)
            return
        if self.phase == CLIMB:
            self.climb(level, rate)
        elif self.phase == HOLD:
            self.best_rate += (rate - self.best_rate) * 0.3
            self.rounds += 1
            self.begin_round(now)
            if self.rounds >= SKIP_ROUNDS:
                self.probe()
            elif self.rounds >= EXCESS_ROUNDS and not self.excess_tried and self.enough() < level:
                self.excess_tried = True
                self.best_rate = rate       # the target may have become slower just now
                self.phase = PROBE_DOWN
                self.go_to(self.enough())
        elif self.phase == PROBE_UP:
            if rate > self.best_rate * UP_GAIN:
                self.best_rate = rate
                self.best_level = level
                self.excess_tried = False
                if level + 1 < self.levels_count and self.flight(level + 1) <= CLIMB_FLIGHT * self.needed:
                    self.go_to(level + 1)
                    return
            self.hold(self.best_level)
        else:
            if rate > self.best_rate * (EXCESS_LOSS if self.excess_tried else DOWN_LOSS):
                self.best_level = level         # best_rate stays: a little less each time would add up
            self.hold(self.best_level)

    cdef void climb(self, int level, double rate) noexcept nogil:
        """LEVEL gives RATE: more, or enough?"""
        cdef double gain = rate / self.best_rate if self.best_rate else 1
        cdef double most = <double>self.flight(level) / <double>self.flight(self.best_level)
        cdef int times = 4 if gain >= most * STEEP_GAIN else 2
        cdef int next_level = level
        if self.best_rate and gain <= CLIMB_GAIN:
            self.hold(self.best_level)
        elif gain < most / 2:
            # The step was too long: as much less in flight as it gave less.
            while next_level > self.best_level + 1 and self.flight(next_level - 1) >= gain * self.flight(self.best_level):
                next_level -= 1
            self.best_rate = rate
            self.best_level = next_level
            self.hold(next_level)
        else:
            self.best_rate = rate
            self.best_level = level
            while (next_level + 1 < self.levels_count and self.flight(next_level) < times * self.flight(level)
                   and self.flight(next_level + 1) <= CLIMB_FLIGHT * self.needed):
                next_level += 1
            if next_level == level:
                self.hold(level)
            else:
                self.go_to(next_level)

    cdef int64_t flight(self, int level) noexcept nogil:
        return self.levels[level].workers * self.levels[level].piece

    cdef int enough(self) noexcept nogil:
        """The lowest level, not below the first, that keeps HOLD_FLIGHT times latency x bandwidth under way, or the present one."""
        cdef int level = min(self.first, self.level)
        while level < self.level and self.flight(level) < HOLD_FLIGHT * self.needed:
            level += 1
        return level

    cdef int64_t gather(self) noexcept nogil:
        cdef int64_t length
        pthread_mutex_lock(&self.mutex)
        length = min(self.levels[self.level].piece, self.flight(self.level) // 8) if self.levels_count > 1 else 0
        pthread_mutex_unlock(&self.mutex)
        return length

    cdef void hold(self, int level) noexcept nogil:
        self.phase = HOLD
        self.rounds = 0
        self.go_to(level)

    cdef void probe(self) noexcept nogil:
        """One level up, the next time one down; never below one worker, where only slowness makes pieces smaller."""
        cdef int level = self.level
        cdef bint up = self.probe_up
        self.rounds = 0
        self.excess_tried = False
        self.probe_up = not up
        if up and level + 1 < self.levels_count and self.flight(level + 1) <= CLIMB_FLIGHT * self.needed:
            self.phase = PROBE_UP
            self.go_to(level + 1)
        elif not up and level > 0 and self.levels[level].workers > 1:
            self.phase = PROBE_DOWN
            self.go_to(level - 1)

    # -- control plane

    def set_rate(self, uint64_t rate):
        """Allow RATE bytes a second from the next piece on; 0: no limit."""
        self.change(rate, self.guest_rate)

    def set_guest_rate(self, uint64_t rate):
        """As set_rate, for the sake of the guest: the lower one counts."""
        self.change(self.rate, rate)

    cdef void change(self, uint64_t rate, uint64_t guest_rate) noexcept:
        cdef int64_t now = now_ns()
        with nogil:
            pthread_mutex_lock(&self.mutex)
            if self.due_ns > now and min(rate, guest_rate) != self.rate_now():
                self.due_ns = now       # what an old, lower rate asked for is not waited for
            self.rate = rate
            self.guest_rate = guest_rate
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    def set_readers(self, int limit):
        """Let no more than LIMIT workers read from the source at once; 0: no limit."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.readers_limit = limit
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    def set_paused(self, bint paused):
        """Begin no piece from now on, or go on."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.paused = paused
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    def status(self):
        """Return workers and piece of the present level, busy workers, in_flight (bytes, at most), rate, guest_rate, paused."""
        cdef Level level
        cdef int busy
        cdef uint64_t rate, guest_rate
        cdef bint paused
        with nogil:
            pthread_mutex_lock(&self.mutex)
            level = self.levels[self.level]
            busy = self.busy
            rate = self.rate
            guest_rate = self.guest_rate
            paused = self.paused
            pthread_mutex_unlock(&self.mutex)
        return {"workers": level.workers, "piece": level.piece, "in_flight": level.workers * level.piece, "busy": busy,
                "rate": rate, "guest_rate": guest_rate, "paused": bool(paused)}
