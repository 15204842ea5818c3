/* Streams of the family AF_VSOCK, for a shell.
 *
 *     vsock connect PORT    sends its input to a port of the host, then prints what the host sends
 *     vsock echo PORT       waits for one connection of the host, and sends back what it gets
 */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

/* Copies until the end of `from`. */
static void copy(int from, int to)
{
    static char buffer[65536];
    ssize_t length;

    while ((length = read(from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0; done < length;) {
            ssize_t now = write(to, buffer + done, length - done);
            check(now, "write");
            done += now;
        }
    check(length, "read");
}

int main(int count, char **arguments)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK };
    int sock = socket(AF_VSOCK, SOCK_STREAM, 0);

    if (count != 3)
        return 2;
    check(sock, "socket");
    address.svm_port = strtoul(arguments[2], NULL, 10);
    if (!strcmp(arguments[1], "connect")) {
        address.svm_cid = VMADDR_CID_HOST;
        check(connect(sock, (struct sockaddr *)&address, sizeof address), "connect");
        copy(0, sock);
        check(shutdown(sock, SHUT_WR), "shutdown");
        copy(sock, 1);
    } else {
        address.svm_cid = VMADDR_CID_ANY;
        check(bind(sock, (struct sockaddr *)&address, sizeof address), "bind");
        check(listen(sock, 4), "listen");
        sock = accept(sock, NULL, NULL);
        check(sock, "accept");
        copy(sock, sock);
        printf("echoed\n");
    }
    return 0;
}
