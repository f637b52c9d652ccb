// Package fault holds the kinds of error that the engine knows. A kind is
// attached where the cause is understood and becomes an HTTP status, a gRPC
// code or an exit code once, at the edge. Everybody imports it; it imports
// the standard library alone.
package fault

import (
	"errors"
	"fmt"
	"syscall"
)

// Kind says what sort of failure an error is.
type Kind uint8

// The kinds, with the HTTP status each becomes.
const (
	Internal         Kind = iota // 500: ours to mend
	Invalid                      // 400: the request is wrong
	Unauthorized                 // 401: who are you
	Forbidden                    // 403: not allowed to do this
	NotFound                     // 404: no such object
	NotModified                  // 304: already in the state asked for
	Conflict                     // 409: the state of an object forbids it
	Gone                         // 410: existed once
	Unsupported                  // 501: this engine or host cannot do it
	Unavailable                  // 503: try again later
	Exhausted                    // 503: disk, descriptors, addresses or ports ran out
	DeadlineExceeded             // 504: took too long
	NotAcceptable                // 406: cannot be had in the form asked for
)

// statuses are the HTTP statuses of the kinds.
var statuses = [...]int{
	Internal: 500, Invalid: 400, Unauthorized: 401, Forbidden: 403, NotFound: 404, NotModified: 304, Conflict: 409, Gone: 410,
	Unsupported: 501, Unavailable: 503, Exhausted: 503, DeadlineExceeded: 504, NotAcceptable: 406,
}

// Status is the HTTP status of a kind; one that is unknown is 500.
func (k Kind) Status() int {
	if int(k) >= len(statuses) {
		return statuses[Internal]
	}
	return statuses[k]
}

// FromStatus is the kind that another's HTTP status stands for; Internal if none does.
func FromStatus(status int) Kind {
	for k, s := range statuses {
		if s == status {
			return Kind(k)
		}
	}
	return Internal
}

type fault struct {
	kind Kind
	msg  string
	err  error
}

func (f *fault) Error() string { return f.msg }
func (f *fault) Unwrap() error { return f.err }

// New returns an error of the kind with the formatted text; %w works as in
// fmt.Errorf.
func New(k Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &fault{kind: k, msg: err.Error(), err: errors.Unwrap(err)}
}

// As gives err the kind, keeping its text. A nil err stays nil.
func As(k Kind, err error) error {
	if err == nil {
		return nil
	}
	return &fault{kind: k, msg: err.Error(), err: err}
}

// Of tells the kind of err: the outermost one attached. Without one it is
// Exhausted where the system says that space, quota or descriptors ran out,
// else Internal.
func Of(err error) Kind {
	var f *fault
	if errors.As(err, &f) && f.kind != Internal {
		return f.kind
	}
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, e) {
			return Exhausted
		}
	}
	return Internal
}

// Is reports whether err is of kind k. A nil error is of no kind.
func Is(err error, k Kind) bool { return err != nil && Of(err) == k }

type exit struct {
	error
	code int
}

func (e *exit) Unwrap() error { return e.error }

// WithExitCode notes what a command line should exit with because of err: 126
// where a command cannot be executed, 127 where it cannot be found. A nil err
// stays nil.
func WithExitCode(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exit{err, code}
}

// ExitCode tells what a command line should exit with because of err: 125 where
// nothing else was noted.
func ExitCode(err error) int {
	var e *exit
	if errors.As(err, &e) {
		return e.code
	}
	return 125
}
