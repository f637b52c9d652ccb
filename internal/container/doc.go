// Package container holds what a container is: its record, its life cycle, its
// name, and the pure decisions about restarting it and judging its health. It
// does no I/O. The engine, the store's users and the API edges import it; the
// vocabulary is the Docker API's types.
//
// A *record* is everything that must be known to take a container back after
// the daemon ended. Records are immutable once published: whoever changes one
// clones it, replaces what differs and publishes the clone.
package container
