/*
 * The first process of a pod's sandbox and of a test node: it holds the namespaces, buries orphans and does nothing.
 *
 * Called with "--until-eof" it also ends when its standard input closes, so that a test node (whose init holds one end
 * of a pipe) dies with the process that made it, however that process ends.
 */
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void leave(int signal_number) { _exit(signal_number == SIGINT || signal_number == SIGTERM ? 0 : 1); }

static void bury(int signal_number) {
	(void)signal_number;
	while (waitpid(-1, NULL, WNOHANG) > 0) {
	}
}

int main(int argc, char **argv) {
	char ignored[64];
	struct sigaction on_end = {.sa_handler = leave}, on_child = {.sa_handler = bury, .sa_flags = SA_NOCLDSTOP | SA_RESTART};

	if (sigaction(SIGINT, &on_end, NULL) || sigaction(SIGTERM, &on_end, NULL) || sigaction(SIGCHLD, &on_child, NULL))
		return 1;
	if (argc > 1 && strcmp(argv[1], "--until-eof") == 0) {
		while (read(STDIN_FILENO, ignored, sizeof ignored) > 0) {
		}
		return 0;
	}
	for (;;)
		pause();
}
