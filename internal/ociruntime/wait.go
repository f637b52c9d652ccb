package ociruntime

import (
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// foreground waits for a process as its parent and passes signals on to it.
type foreground struct{ ch chan os.Signal }

// allAfter is how long only the usual signals are passed on: each of the others
// takes Go a round between threads, together longer than many a program runs.
const allAfter = 20 * time.Millisecond

// watchSignals begins to collect signals, before there is a process that could end.
func watchSignals() *foreground {
	f := &foreground{ch: make(chan os.Signal, 128)}
	signal.Notify(f.ch, unix.SIGCHLD, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM)
	return f
}

func (f *foreground) stop() { signal.Stop(f.ch) }

// wait returns the status that a shell would report. Other children of ours, which
// a subreaper may get, are buried meanwhile.
func (f *foreground) wait(p *process, io *streams) (int, error) {
	defer p.release()
	all := time.NewTimer(allAfter)
	defer all.Stop()
	for {
		if status, ended := reap(p.pid); ended {
			io.drain()
			return status, nil
		}
		var got os.Signal
		select {
		case got = <-f.ch:
		case <-all.C:
			signal.Notify(f.ch)
			continue
		}
		switch s := got.(unix.Signal); s {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE:
			// ours
		case unix.SIGWINCH:
			io.resize()
		default:
			_ = unix.PidfdSendSignal(p.pidfd, s, nil, 0)
		}
	}
}

// reap buries every child that has ended; it reports the end of one.
func reap(pid int) (status int, ended bool) {
	for {
		var ws unix.WaitStatus
		n, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return status, ended
		}
		if n != pid {
			continue
		}
		status, ended = ws.ExitStatus(), true
		if ws.Signaled() {
			status = 128 + int(ws.Signal())
		}
	}
}
