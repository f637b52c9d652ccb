// Package terminal deals with the user's terminal: whether there is one, its
// size, raw mode. The command line imports it.
package terminal

import (
	"os"

	"golang.org/x/term"
)

// Is reports whether f is a terminal.
func Is(f any) bool {
	fd, ok := f.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(fd.Fd()))
}

// Size gives the size of the terminal f in cells, zeros when unknown.
func Size(f *os.File) (width, height int) {
	w, h, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0, 0
	}
	return w, h
}

// Raw puts the terminal in raw mode, for keys to reach the container as they
// are. The function puts it back and may be called twice.
func Raw(in, out *os.File) (restore func(), err error) {
	state, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, err
	}
	undo := enableVT(out)
	done := false
	return func() {
		if !done {
			done = true
			undo()
			term.Restore(int(in.Fd()), state)
		}
	}, nil
}

// ReadPassword reads a line without echo.
func ReadPassword(in *os.File) (string, error) {
	b, err := term.ReadPassword(int(in.Fd()))
	return string(b), err
}
