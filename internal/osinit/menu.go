package osinit

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/install"
)

// menuPatience is how long the menu waits for a first key.
const menuPatience = 10 * time.Second

// menu asks on the screen and on the serial console what the machine is to do, and returns
// the document for it. Whoever answers first is who is asked on.
func (m *machine) menu(ctx context.Context, doc *config.Document) *config.Document {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type chosen struct {
		doc *config.Document
		raw []byte
	}
	answers := make(chan chosen)
	begun := make(chan struct{}, 4)
	asked := 0
	for _, name := range []string{"/dev/tty0", "/dev/ttyS0", "/dev/ttyAMA0"} {
		t, err := openTerminal(name)
		if err != nil {
			continue
		}
		asked++
		stop := context.AfterFunc(ctx, func() { t.Close() })
		defer stop()
		go func() {
			q := &questions{in: bufio.NewReader(t), out: t, begun: func() {
				select {
				case begun <- struct{}{}:
				default:
				}
			}}
			raw := q.ask(m, m.Config())
			if raw == nil && !q.answered {
				return // it has gone, or nobody is there
			}
			d := doc
			if raw != nil {
				var err error
				if d, err = config.Parse(raw); err != nil {
					fmt.Fprintf(t, "cannot use the answers: %v\r\n", err)
					d, raw = doc, nil
				}
			}
			select {
			case answers <- chosen{d, raw}:
			case <-ctx.Done():
			}
		}()
	}
	if asked == 0 {
		return doc
	}
	limit := time.After(menuPatience)
	for {
		select {
		case <-begun:
			limit = nil // somebody is there
		case <-limit:
			m.log.Printf("nobody chose anything: the machine runs from the medium")
			return doc
		case <-ctx.Done():
			return doc
		case c := <-answers:
			if c.raw != nil {
				m.mu.Lock()
				m.document, m.configSource = c.raw, "console"
				m.mu.Unlock()
			}
			return c.doc
		}
	}
}

// openTerminal opens a console to ask on. It is no one's controlling terminal.
func openTerminal(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil { // a port that nothing is on
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// questions are asked on one console.
type questions struct {
	in       *bufio.Reader
	out      io.Writer
	begun    func()
	answered bool
}

func (q *questions) line(format string, args ...any) (string, error) {
	fmt.Fprintf(q.out, strings.ReplaceAll(format, "\n", "\r\n"), args...)
	s, err := q.in.ReadString('\n')
	if err == nil {
		q.answered = true
		q.begun()
	}
	return strings.TrimSpace(s), err
}

// ask returns a document to install by, or nothing for running from the medium.
func (q *questions) ask(m *machine, document []byte) []byte {
	role := ""
	for role == "" {
		s, err := q.line("\nCloudOS %s\n\n  1  run from this medium (nothing is installed)\n  2  install: a machine by itself\n  3  install: the first master of a new cluster\n  4  install: a node that joins a cluster\n\nChoose, within %d seconds, else 1: ", runningVersion(), int(menuPatience/time.Second))
		if err != nil {
			return nil
		}
		switch s {
		case "", "1":
			return nil
		case "2":
			role = "standalone"
		case "3":
			role = "master"
		case "4":
			role = "node"
		}
	}
	server := ""
	for role == "node" && server == "" {
		var err error
		if server, err = q.line("\nAddress of a master (HOST:PORT): "); err != nil {
			return nil
		}
	}
	hostname, err := q.line("\nName of this machine (nothing: %s): ", m.hostname())
	if err != nil {
		return nil
	}
	disks, err := install.Disks()
	if err != nil {
		fmt.Fprintf(q.out, "\r\ncannot look for disks: %v\r\n", err)
		return nil
	}
	disk := q.disk(disks)
	if disk == nil {
		return nil
	}
	return answers(document, role, server, hostname, *disk)
}

// disk asks for one, and again whether what is on it may go.
func (q *questions) disk(disks []install.Disk) *install.Disk {
	for {
		fmt.Fprint(q.out, "\r\n")
		for i, d := range disks {
			fmt.Fprintf(q.out, "  %d  %s\r\n", i+1, d)
		}
		s, err := q.line("\nDisk to install on, by its number (nothing: do not install): ")
		if err != nil || s == "" {
			return nil
		}
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > len(disks) || disks[n-1].InUse != "" || disks[n-1].Size < install.Least() {
			fmt.Fprint(q.out, "\r\nThis is not possible.\r\n")
			continue
		}
		d := disks[n-1]
		if d.Holds == "" {
			return &d
		}
		s, err = q.line("\n%s holds %s. All of it will be lost. Type %s to go on: ", d.Path, d.Holds, d.Path)
		if err != nil {
			return nil
		}
		if s == d.Path {
			return &d
		}
	}
}

// answers is the document with what was answered; the rest of it is kept.
func answers(document []byte, role, server, hostname string, d install.Disk) []byte {
	set := map[string]any{"role": role, "install": map[string]any{"disk": map[string]any{"path": d.Path, "wipe": d.Holds != ""}}}
	if server != "" {
		set["join"] = map[string]any{"server": server}
	}
	if hostname != "" {
		set["hostname"] = hostname
	}
	out, err := config.With(document, set)
	if err != nil {
		return nil
	}
	return out
}
