/* An engine that costs next to nothing: fixed answers over HTTP/1.1, one thread, epoll.
 *
 *   perf_engine PORT FIRST_HOST HOSTS CHUNKS ANSWER CHUNK [PATH=FILE ...]
 *
 * Listens on HOSTS addresses in a row (127.0.0.1, 127.0.0.2, ...), so that one process is many workers. A POST gets the
 * file ANSWER; with "stream": true CHUNKS times the file CHUNK as server-sent events, each in a write of its own, all
 * open streams in turns. A GET gets the file of the first PATH that fits (its query, or the rest of it, may be left
 * off), else 404. In these files 17 `@` are replaced by the time: an engine's figures are never the same twice.
 * Prints "ready" when it listens. Whoever started it ends it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LISTENER_BACKLOG 1024
#define EVENTS 256
#define FIRST_BUFFER 16384
#define NOW "@@@@@@@@@@@@@@@@@"

struct text { char *bytes; size_t size; };
#define MAX_TIMES 64
struct page {
    const char *path;
    size_t path_size;
    struct text answer;
    int times;
    size_t time_at[MAX_TIMES]; /* offsets of NOW */
};

struct connection {
    int fd;
    int is_listener;
    char *buffer;
    size_t size, capacity;
    int chunked;                      /* the request under way has no content-length */
    size_t header_bytes, whole_bytes; /* of the request at the start of the buffer; 0: not known yet */
    int chunks_left;                  /* of the stream under way, its last one included */
    struct connection *next;          /* in `streams` */
};

static struct text answer, first_chunk, chunk, last_chunk, not_found;
static struct page *pages;
static int page_count, chunk_count, poller;
static struct connection *streams;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *must(void *memory) {
    if (!memory) fail("memory");
    return memory;
}

static struct text read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    struct text text = {must(malloc((size_t)ftell(file) + 1)), (size_t)ftell(file)};
    rewind(file);
    if (fread(text.bytes, 1, text.size, file) != text.size) fail(path);
    fclose(file);
    return text;
}

static struct text http(const char *status, const char *type, struct text body) {
    struct text text = {must(malloc(body.size + 256)), 0};
    int head = sprintf(text.bytes, "HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n", status, type, body.size);
    memcpy(text.bytes + head, body.bytes, body.size);
    text.size = (size_t)head + body.size;
    return text;
}

static struct text http_chunk(struct text body, const char *before, const char *after) {
    struct text text = {must(malloc(body.size + 256)), 0};
    int head = sprintf(text.bytes, "%s%zx\r\n", before, body.size);
    memcpy(text.bytes + head, body.bytes, body.size);
    text.size = (size_t)head + body.size + (size_t)sprintf(text.bytes + (size_t)head + body.size, "\r\n%s", after);
    return text;
}

static int send_all(int fd, struct text text) {
    size_t sent = 0;
    while (sent < text.size) {
        ssize_t n = send(fd, text.bytes + sent, text.size - sent, MSG_NOSIGNAL);
        if (n >= 0) {
            sent += (size_t)n;
        } else if (errno == EAGAIN) { /* the peer is slow: the others wait, which never lasts with answers this short */
            struct pollfd writable = {fd, POLLOUT, 0};
            poll(&writable, 1, -1);
        } else {
            return 0;
        }
    }
    return 1;
}

static void drop(struct connection *c) {
    for (struct connection **at = &streams; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    close(c->fd);
    free(c->buffer);
    free(c);
}

/* Whether the last "stream" in the body is true: what a gateway adds at the end wins, as with any JSON decoder. */
static int wants_stream(const char *body, size_t size) {
    static const char key[] = "\"stream\"";
    const char *found = NULL, *at = body, *end = body + size;
    while ((at = memmem(at, (size_t)(end - at), key, sizeof key - 1))) {
        at += sizeof key - 1;
        found = at;
    }
    if (!found) return 0;
    while (found < end && (isspace((unsigned char)*found) || *found == ':')) found++;
    return end - found >= 4 && !memcmp(found, "true", 4);
}

static int answer_get(struct connection *c) {
    const char *path = c->buffer + sizeof "GET " - 1;
    for (int i = 0; i < page_count; i++) {
        struct page *page = &pages[i];
        if (strncmp(path, page->path, page->path_size) || !strchr(" ?&", path[page->path_size])) continue;
        char text[32];
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        snprintf(text, sizeof text, "%010lld.%06ld", (long long)now.tv_sec, now.tv_nsec / 1000);
        for (int j = 0; j < page->times; j++) memcpy(page->answer.bytes + page->time_at[j], text, sizeof NOW - 1);
        return send_all(c->fd, page->answer);
    }
    return send_all(c->fd, not_found);
}

static int answer_post(struct connection *c) {
    if (!wants_stream(c->buffer + c->header_bytes, c->whole_bytes - c->header_bytes)) return send_all(c->fd, answer);
    c->chunks_left = chunk_count; /* the first one goes out now, with the headers */
    c->next = streams;
    streams = c;
    return send_all(c->fd, first_chunk);
}

/* Answers what is complete in the buffer. 0: the connection is over. */
static int take(struct connection *c) {
    while (c->size && !c->chunks_left) {
        if (!c->whole_bytes) {
            c->buffer[c->size] = 0;
            char *end = strstr(c->buffer, "\r\n\r\n");
            if (!end) return c->size < FIRST_BUFFER - 1;
            c->header_bytes = (size_t)(end - c->buffer) + 4;
            c->whole_bytes = c->header_bytes;
            *end = 0;
            char *length = strcasestr(c->buffer, "\r\ncontent-length:");
            char *framing = strcasestr(c->buffer, "\r\ntransfer-encoding:");
            *end = '\r';
            c->chunked = framing != NULL;
            if (length) c->whole_bytes += strtoul(length + sizeof "\r\ncontent-length:" - 1, NULL, 10);
        }
        if (c->chunked) { /* over when it ends like this; whoever sends it waits for the answer, so nothing follows */
            if (c->size < c->header_bytes + 5 || memcmp(c->buffer + c->size - 5, "0\r\n\r\n", 5)) return 1;
            c->whole_bytes = c->size;
        }
        if (c->size < c->whole_bytes) return 1;
        if (!(strncmp(c->buffer, "GET ", 4) ? answer_post(c) : answer_get(c))) return 0;
        c->size -= c->whole_bytes;
        memmove(c->buffer, c->buffer + c->whole_bytes, c->size);
        c->whole_bytes = 0;
    }
    return 1;
}

static void readable(struct connection *c) {
    for (;;) {
        size_t wanted = (c->whole_bytes > c->size ? c->whole_bytes : c->size) + FIRST_BUFFER;
        if (c->capacity < wanted) c->buffer = must(realloc(c->buffer, c->capacity = wanted));
        ssize_t n = recv(c->fd, c->buffer + c->size, c->capacity - c->size - 1, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n > 0) c->size += (size_t)n;
        if (n <= 0 || !take(c)) {
            drop(c);
            return;
        }
        if (c->size + 1 < c->capacity) return; /* there was no more; if there is, epoll says so */
    }
}

static void watch(struct connection *c) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl");
}

static void accept_all(struct connection *listener) {
    int fd, one = 1;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = must(calloc(1, sizeof *c));
        c->fd = fd;
        watch(c);
    }
}

/* One chunk of every stream. */
static void stream_round(void) {
    for (struct connection *c = streams, *next; c; c = next) {
        next = c->next;
        int sent = send_all(c->fd, --c->chunks_left ? chunk : last_chunk);
        if (sent && c->chunks_left) continue;
        for (struct connection **at = &streams; *at; at = &(*at)->next)
            if (*at == c) {
                *at = next;
                break;
            }
        c->chunks_left = 0;
        if (!sent || !take(c)) drop(c);
    }
}

int main(int count, char **words) {
    if (count < 7) {
        fprintf(stderr, "usage: perf_engine PORT FIRST_HOST HOSTS CHUNKS ANSWER CHUNK [PATH=FILE ...]\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    chunk_count = atoi(words[4]);
    answer = http("200 OK", "application/json", read_file(words[5]));
    struct text body = read_file(words[6]), done = {"data: [DONE]\n\n", 14};
    chunk = http_chunk(body, "", "");
    first_chunk = http_chunk(body, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n", "");
    last_chunk = http_chunk(done, "", "0\r\n\r\n");
    not_found = http("404 Not Found", "application/json", (struct text){"{}", 2});
    page_count = count - 7;
    pages = must(calloc((size_t)page_count + 1, sizeof *pages));
    for (int i = 0; i < page_count; i++) {
        struct page *page = &pages[i];
        char *equals = strrchr(words[i + 7], '='); /* a query has some, too */
        if (!equals) fail(words[i + 7]);
        *equals = 0;
        page->path = words[i + 7];
        page->path_size = strlen(page->path);
        int is_json = strstr(equals + 1, ".json") != NULL;
        page->answer = http("200 OK", is_json ? "application/json" : "text/plain; version=0.0.4", read_file(equals + 1));
        page->answer.bytes[page->answer.size] = 0;
        for (char *at = page->answer.bytes; page->times < MAX_TIMES && (at = strstr(at, NOW)); at += sizeof NOW - 1)
            page->time_at[page->times++] = (size_t)(at - page->answer.bytes);
    }
    poller = epoll_create1(0);
    struct in_addr host;
    if (!inet_aton(words[2], &host)) fail(words[2]);
    for (int i = 0; i < atoi(words[3]); i++) {
        int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(words[1]))};
        address.sin_addr.s_addr = htonl(ntohl(host.s_addr) + (unsigned)i);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, LISTENER_BACKLOG)) fail("listen");
        struct connection *listener = must(calloc(1, sizeof *listener));
        listener->fd = fd;
        listener->is_listener = 1;
        watch(listener);
    }
    puts("ready");
    fflush(stdout);
    struct epoll_event events[EVENTS];
    for (;;) {
        int n = epoll_wait(poller, events, EVENTS, streams ? 0 : -1);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->is_listener)
                accept_all(c);
            else
                readable(c);
        }
        stream_round();
    }
}
