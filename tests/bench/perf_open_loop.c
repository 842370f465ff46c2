/* Requests at a fixed rate, whether answers come or not (open loop): what wrk, which waits, does not do.
 *
 *   perf_open_loop HOST PORT RATE SECONDS SEED REQUEST
 *
 * Sends the file REQUEST (headers and body) at moments of a Poisson process, each on an idle connection or on a new one.
 * A latency counts from the moment the request was due, not from when it was sent. In REQUEST, `00000000` at its first
 * occurrence is replaced by the request's number. Prints one JSON object; times in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NUMBER "00000000"
#define MAX_CONNECTIONS 4096
#define ANSWER_BYTES 262144
#define PATIENCE_US 10000000.0 /* after the last request was sent */
#define EVENTS 256

struct connection {
    int fd;
    int busy;
    double due_us;
    char *answer;
    size_t size, whole; /* whole: 0 while not known; SIZE_MAX: chunked */
    size_t unsent;
    char *request;
    struct connection *next; /* idle ones */
};

static struct connection *idle;
static struct sockaddr_in peer;
static char *request;
static size_t request_size;
static char *number;
static int poller, connections;
static long sent, answered, failed, under_way;
static double *latencies_us, late_us;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static struct connection *connect_one(void) {
    if (connections == MAX_CONNECTIONS) return NULL;
    struct connection *c = calloc(1, sizeof *c);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (!c || fd < 0) fail("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&peer, sizeof peer) && errno != EINPROGRESS) fail("connect");
    c->fd = fd;
    c->answer = malloc(ANSWER_BYTES);
    c->request = malloc(request_size);
    if (!c->answer || !c->request) fail("memory");
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
    connections++;
    return c;
}

static void hang_up(struct connection *c) {
    connections--;
    close(c->fd);
    c->fd = -1; /* an event for it may still be in the list: kept, as these are few */
}

static void over(struct connection *c, int well) {
    under_way--;
    c->busy = 0;
    if (well) {
        latencies_us[answered++] = now_us() - c->due_us;
        c->size = c->whole = 0;
        c->next = idle;
        idle = c;
        return;
    }
    failed++;
    hang_up(c);
}

static void push(struct connection *c) {
    while (c->unsent) {
        ssize_t n = send(c->fd, c->request + request_size - c->unsent, c->unsent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN && errno != ENOTCONN) over(c, 0);
            return;
        }
        c->unsent -= (size_t)n;
    }
}

static void start(double due_us) {
    struct connection *c = idle ? idle : connect_one();
    sent++;
    under_way++;
    if (!c) {
        under_way--;
        failed++;
        return;
    }
    if (c == idle) idle = c->next;
    char digits[16];
    snprintf(digits, sizeof digits, "%08ld", sent % 100000000);
    if (number) memcpy(number, digits, sizeof NUMBER - 1);
    memcpy(c->request, request, request_size);
    c->due_us = due_us;
    c->unsent = request_size;
    c->busy = 1;
    push(c);
}

/* Whether the answer is complete: 1, not yet: 0, not one to count: -1. */
static int complete(struct connection *c) {
    if (!c->whole) {
        c->answer[c->size] = 0;
        char *end = strstr(c->answer, "\r\n\r\n");
        if (!end) return 0;
        if (strncmp(c->answer, "HTTP/1.1 200", 12)) return -1;
        *end = 0;
        char *length = strcasestr(c->answer, "\r\ncontent-length:");
        *end = '\r';
        c->whole = length ? (size_t)(end + 4 - c->answer) + strtoul(length + 17, NULL, 10) : (size_t)-1;
    }
    if (c->whole != (size_t)-1) return c->size >= c->whole;
    return c->size >= 5 && !memcmp(c->answer + c->size - 5, "0\r\n\r\n", 5);
}

static void pull(struct connection *c) {
    for (;;) {
        ssize_t n = recv(c->fd, c->answer + c->size, ANSWER_BYTES - 1 - c->size, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            if (c->busy) {
                over(c, 0);
            } else { /* the server closes an idle connection */
                for (struct connection **at = &idle; *at; at = &(*at)->next)
                    if (*at == c) {
                        *at = c->next;
                        break;
                    }
                hang_up(c);
            }
            return;
        }
        c->size += (size_t)n;
        int is = complete(c);
        if (is) {
            over(c, is > 0);
            return;
        }
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(double q) {
    return answered ? latencies_us[(long)(q * (double)(answered - 1))] : 0;
}

int main(int count, char **words) {
    if (count != 7) {
        fprintf(stderr, "usage: perf_open_loop HOST PORT RATE SECONDS SEED REQUEST\n");
        return 2;
    }
    double rate = atof(words[3]), seconds = atof(words[4]);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    srand48(atol(words[5]));
    peer.sin_family = AF_INET;
    peer.sin_port = htons((unsigned short)atoi(words[2]));
    if (!inet_aton(words[1], &peer.sin_addr)) fail(words[1]);
    FILE *file = fopen(words[6], "rb");
    if (!file) fail(words[6]);
    fseek(file, 0, SEEK_END);
    request_size = (size_t)ftell(file);
    rewind(file);
    request = malloc(request_size + 1);
    latencies_us = calloc((size_t)(rate * seconds * 2 + 1000), sizeof *latencies_us);
    if (!request || !latencies_us || fread(request, 1, request_size, file) != request_size) fail(words[6]);
    request[request_size] = 0;
    number = strstr(request, NUMBER);
    poller = epoll_create1(0);

    struct epoll_event events[EVENTS];
    double begin_us = now_us(), due_us = begin_us, end_us = begin_us + seconds * 1e6;
    while (under_way || due_us < end_us) {
        double now = now_us();
        if (now > end_us + PATIENCE_US) break;
        for (; due_us < end_us && due_us <= now; due_us -= log(1 - drand48()) / rate * 1e6) {
            if (now - due_us > late_us) late_us = now - due_us;
            start(due_us);
        }
        double wait_us = due_us < end_us ? due_us - now_us() : 1e5;
        struct timespec wait = {0, wait_us > 0 ? (long)(wait_us * 1e3) % 1000000000 : 0};
        int n = epoll_pwait2(poller, events, EVENTS, &wait, NULL);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->fd >= 0 && events[i].events & EPOLLOUT) push(c);
            if (c->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) pull(c);
        }
    }
    failed += under_way;
    double mean = 0;
    for (long i = 0; i < answered; i++) mean += latencies_us[i] / (double)answered;
    qsort(latencies_us, (size_t)answered, sizeof *latencies_us, compare);
    printf("{\"sent\": %ld, \"answered\": %ld, \"failed\": %ld, \"seconds\": %.6f, \"mean_us\": %.1f, \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"late_us\": %.1f, \"connections\": %d}\n",
           sent, answered, failed, (now_us() - begin_us) / 1e6, mean, quantile(0.5), quantile(0.99), late_us, connections);
    return 0;
}
