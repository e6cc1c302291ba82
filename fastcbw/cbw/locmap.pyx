"""The location map: a two-level table of location words, allocated on touch.

The root has a pointer for every 64 clusters, in a mapping of its own that costs nothing until touched; a leaf has the
64 words of the clusters of one bitmap word, 512 bytes. One preserved cluster thus costs 512 bytes and a share of a page
of the root, and a walk costs what was touched: a bit per page of the root says where leaves are.

Leaves are never freed before the map: a look-up may hold a pointer to one without being counted anywhere.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.kernels.atomic cimport load_acquire, or_release, store_release
from fastcbw.kernels.bits cimport bits_next_one
from fastcbw.sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

cdef int64_t LEAF_BYTES = LEAF_CLUSTERS * 8
cdef int64_t ARENA_BYTES = 1 << 20


cdef inline int64_t roots_of(int64_t clusters) noexcept nogil:
    return (clusters + LEAF_CLUSTERS - 1) // LEAF_CLUSTERS


cdef inline int64_t pages_of(int64_t clusters) noexcept nogil:
    return (roots_of(clusters) + ROOTS_PER_PAGE - 1) // ROOTS_PER_PAGE


cdef inline int64_t touched_bytes(int64_t clusters) noexcept nogil:
    return ((pages_of(clusters) + 63) // 64) * 8


cdef int map_init(LocationMap *map, int64_t clusters) noexcept nogil:
    map.clusters = clusters
    map.arena = NULL
    map.arena_left = 0
    map.roots = <uint64_t *>map_pages(roots_of(clusters) * 8)
    map.touched = <uint64_t *>map_pages(touched_bytes(clusters))
    if map.roots == NULL or map.touched == NULL or pthread_mutex_init(&map.lock, NULL) != 0:
        if map.roots != NULL:
            unmap_pages(map.roots, roots_of(clusters) * 8)
        if map.touched != NULL:
            unmap_pages(map.touched, touched_bytes(clusters))
        map.roots = map.touched = NULL
        return -ENOMEM
    return 0


cdef void map_free(LocationMap *map) noexcept nogil:
    cdef char *chunk = map.arena
    cdef char *older
    if map.roots == NULL:
        return
    while chunk != NULL:
        older = (<char **>chunk)[0]
        unmap_pages(chunk, ARENA_BYTES)
        chunk = older
    unmap_pages(map.roots, roots_of(map.clusters) * 8)
    unmap_pages(map.touched, touched_bytes(map.clusters))
    pthread_mutex_destroy(&map.lock)
    map.roots = map.touched = NULL
    map.arena = NULL


cdef const uint64_t *map_leaf(LocationMap *map, int64_t cluster) noexcept nogil:
    # First whether any leaf is there: to look into a page of the root that was never touched costs a fault, and a page table
    # of its own on a large disk. The bit is set before the pointer is published, so that who has to find the leaf finds it.
    cdef int64_t root = cluster // LEAF_CLUSTERS
    cdef int64_t page = root // ROOTS_PER_PAGE
    if not (load_acquire(map.touched + page // 64) >> (page % 64)) & 1:
        return NULL
    return <const uint64_t *>load_acquire(map.roots + root)


cdef uint64_t map_get(LocationMap *map, int64_t cluster) noexcept nogil:
    cdef const uint64_t *leaf = map_leaf(map, cluster)
    if leaf == NULL:
        return WORD_NONE
    return load_acquire(leaf + cluster % LEAF_CLUSTERS)


cdef uint64_t *map_place(LocationMap *map, int64_t cluster) noexcept nogil:
    cdef int64_t root = cluster // LEAF_CLUSTERS
    cdef uint64_t *leaf = <uint64_t *>load_acquire(map.roots + root)
    if leaf == NULL:
        leaf = install_leaf(map, root)
        if leaf == NULL:
            return NULL
    return leaf + cluster % LEAF_CLUSTERS


cdef uint64_t *install_leaf(LocationMap *map, int64_t root) noexcept nogil:
    """Make the leaf of ROOT, unless another thread was faster. The pointer is published after the zeroes it names."""
    cdef uint64_t *leaf
    cdef char *chunk
    cdef int64_t page
    pthread_mutex_lock(&map.lock)
    leaf = <uint64_t *>load_acquire(map.roots + root)
    if leaf == NULL:
        if map.arena_left < LEAF_BYTES:
            chunk = <char *>map_pages(ARENA_BYTES)
            if chunk != NULL:
                (<char **>chunk)[0] = map.arena
                map.arena = chunk
                map.arena_left = ARENA_BYTES - LEAF_BYTES       # the first leaf's place holds the link
        if map.arena_left >= LEAF_BYTES:
            leaf = <uint64_t *>(map.arena + (ARENA_BYTES - map.arena_left))
            map.arena_left -= LEAF_BYTES
            page = root // ROOTS_PER_PAGE
            or_release(map.touched + page // 64, (<uint64_t>1) << (page % 64))
            store_release(map.roots + root, <uint64_t>leaf)
    pthread_mutex_unlock(&map.lock)
    return leaf


cdef int64_t map_next_leaf(LocationMap *map, int64_t cluster) noexcept nogil:
    return map_next_leaf_before(map, cluster, map.clusters)


cdef int64_t map_next_leaf_before(LocationMap *map, int64_t cluster, int64_t limit) noexcept nogil:
    cdef int64_t root = cluster // LEAF_CLUSTERS
    cdef int64_t end = roots_of(limit if limit < map.clusters else map.clusters)
    cdef int64_t page, page_end
    while root < end:
        page = root // ROOTS_PER_PAGE
        page_end = bits_next_one(map.touched, page, (end + ROOTS_PER_PAGE - 1) // ROOTS_PER_PAGE)
        if page_end != page:
            page = page_end
            root = page * ROOTS_PER_PAGE
            if root >= end:
                break
        page_end = (page + 1) * ROOTS_PER_PAGE
        while root < end and root < page_end:
            if load_acquire(map.roots + root) != 0:
                return root * LEAF_CLUSTERS
            root += 1
    return map.clusters
