//go:build !windows

package terminal

import (
	"os"
	"os/signal"
	"syscall"
)

func enableVT(*os.File) func() { return func() {} }

// EnableVT makes a terminal understand control sequences; it does here.
func EnableVT(*os.File) func() { return func() {} }

// Resized gives a value whenever the terminal's size may have changed.
func Resized(*os.File) (c <-chan struct{}, stop func()) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGWINCH)
	out := make(chan struct{}, 1)
	end := make(chan struct{})
	go func() {
		for {
			select {
			case <-sig:
				select {
				case out <- struct{}{}:
				default:
				}
			case <-end:
				return
			}
		}
	}()
	return out, func() { signal.Stop(sig); close(end) }
}
