package terminal

import (
	"os"
	"time"

	"golang.org/x/sys/windows"
)

// EnableVT makes a console understand control sequences. The function undoes it.
func EnableVT(f *os.File) func() { return enableVT(f) }

func enableVT(f *os.File) func() {
	h := windows.Handle(f.Fd())
	var mode uint32
	if windows.GetConsoleMode(h, &mode) != nil {
		return func() {}
	}
	if windows.SetConsoleMode(h, mode|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING) != nil {
		return func() {}
	}
	return func() { windows.SetConsoleMode(h, mode) }
}

// Resized gives a value whenever the console's size has changed. Consoles do not
// tell, so it is looked at.
func Resized(f *os.File) (c <-chan struct{}, stop func()) {
	out := make(chan struct{}, 1)
	end := make(chan struct{})
	go func() {
		t := time.NewTicker(250 * time.Millisecond)
		defer t.Stop()
		w, h := Size(f)
		for {
			select {
			case <-t.C:
				if nw, nh := Size(f); nw != w || nh != h {
					w, h = nw, nh
					select {
					case out <- struct{}{}:
					default:
					}
				}
			case <-end:
				return
			}
		}
	}()
	return out, func() { close(end) }
}
