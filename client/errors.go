package client

import (
	"errors"
	"fmt"
)

// Error is an answer of the engine that says no.
type Error struct {
	// Status is the HTTP status.
	Status int
	// Message is the engine's text.
	Message string
	// ExitCode is what a command line should exit with, when the engine said so
	// (125, 126, 127), else 0.
	ExitCode int
}

func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the engine answered with status %d", e.Status)
	}
	return e.Message
}

// ConnectError says that the engine could not be reached.
type ConnectError struct {
	Host string
	Err  error
}

func (e *ConnectError) Error() string {
	return fmt.Sprintf("cannot reach the engine at %s: %v", e.Host, e.Err)
}

func (e *ConnectError) Unwrap() error { return e.Err }

// ErrConnectionLost is wrapped by the error of an exchange that broke after the
// engine had accepted it.
var ErrConnectionLost = errors.New("the connection to the engine was lost")

// Status tells the HTTP status of err if it is an *Error, else 0.
func Status(err error) int {
	var e *Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// IsNotFound reports whether the engine knows no such object.
func IsNotFound(err error) bool { return Status(err) == 404 }

// IsConflict reports whether an object's state forbade it.
func IsConflict(err error) bool { return Status(err) == 409 }

// IsNotModified reports whether the object was in the state asked for already.
func IsNotModified(err error) bool { return Status(err) == 304 }

// IsUnauthorized reports whether credentials were missing or refused.
func IsUnauthorized(err error) bool { s := Status(err); return s == 401 || s == 403 }

// IsUnsupported reports whether this engine cannot do it at all.
func IsUnsupported(err error) bool { return Status(err) == 501 }
