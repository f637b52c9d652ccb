// Package engine holds the use cases: what it means to create, start, stop,
// look at and remove a container, and to keep all of them over the daemon's own
// death. It decides and orders; the kernel is touched by what it is given:
// drivers (package runtime), layers (snapshot), images, networks and volumes,
// whose needed methods are declared in needs.go. The Docker and CRI edges call it.
//
// Vocabulary. A *unit* is a container as the running daemon knows it: its
// published record, its task while it runs, and who waits for it. Its *operation
// token* is taken by whatever changes its life (start, stop, remove, …), one at a
// time; its mutex guards memory alone and is never held across I/O. *Teardown* is
// what follows the end of a process: mounts, cgroup, endpoints; it happens off
// the path of whoever waits for the exit, and the next operation waits for it.
package engine
