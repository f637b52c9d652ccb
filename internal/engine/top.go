package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// psPid matches a user-defined format with the pid column renamed.
var psPid = pattern.New(`\s+pid\s*=\s*PID\b|-o\s*pid=`)

// ContainerTop lists the processes of a container in the host's terms, with the
// options of ps(1).
func (e *Engine) ContainerTop(ctx context.Context, name, psArgs string) (mcontainer.TopResponse, error) {
	var out mcontainer.TopResponse
	if psArgs == "" {
		psArgs = "-ef"
	}
	if strings.ContainsAny(psArgs, "\x00\n") || psPid.MatchString(psArgs) {
		return out, fault.New(fault.Invalid, "specifying \"pid=\" or control characters in ps arguments is not allowed: %q", psArgs)
	}
	u, err := e.lookup(name)
	if err != nil {
		return out, err
	}
	t, err := u.needTask()
	if err != nil {
		return out, err
	}
	if u.rec.Load().State.Status == mcontainer.StateRestarting {
		return out, fault.New(fault.Conflict, "container %s is restarting, wait until the container is running", u.id)
	}
	pids, err := t.Pids(ctx)
	if err != nil {
		return out, fmt.Errorf("cannot list the processes of container %s: %w", u.id, err)
	}
	args := strings.Fields(psArgs)
	if slices.Equal(args, []string{"-ef"}) {
		out = topFull(pids)
	} else {
		out, err = topByPS(ctx, args, pids)
	}
	if err == nil {
		e.publish(u, events.ActionTop, nil)
	}
	return out, err
}

// topByPS runs the host's ps and keeps the container's lines.
func topByPS(ctx context.Context, args []string, pids []int) (mcontainer.TopResponse, error) {
	var out mcontainer.TopResponse
	ps, err := exec.LookPath("ps")
	if err != nil {
		return out, fault.New(fault.Unsupported, "cannot run ps with %q: this host has no ps; only -ef is built in", strings.Join(args, " "))
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	b, err := exec.CommandContext(ctx, ps, args...).Output()
	if err != nil {
		var xe *exec.ExitError
		if errors.As(err, &xe) {
			return out, fault.New(fault.Invalid, "ps: %s", strings.TrimSpace(string(bytes.SplitN(xe.Stderr, []byte{'\n'}, 2)[0])))
		}
		return out, fmt.Errorf("cannot run ps: %w", err)
	}
	lines := strings.Split(string(b), "\n")
	out.Titles = strings.Fields(lines[0])
	col := slices.Index(out.Titles, "PID")
	if col < 0 {
		return out, fault.New(fault.Invalid, "couldn't find PID field in ps output")
	}
	out.Processes = [][]string{}
	for _, l := range lines[1:] {
		f := strings.Fields(l)
		if len(f) <= col {
			continue
		}
		pid, err := strconv.Atoi(f[col])
		if err != nil || !slices.Contains(pids, pid) {
			continue
		}
		if n := len(out.Titles); len(f) > n { // the last column holds blanks
			f = append(f[:n-1:n-1], strings.Join(f[n-1:], " "))
		}
		out.Processes = append(out.Processes, f)
	}
	return out, nil
}

// topFull is ps -ef, read from /proc.
func topFull(pids []int) mcontainer.TopResponse {
	out := mcontainer.TopResponse{Titles: []string{"UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"}, Processes: [][]string{}}
	boot := bootTime()
	now := time.Now()
	const hz = 100 // USER_HZ of every architecture Go runs on
	for _, pid := range pids {
		dir := "/proc/" + strconv.Itoa(pid)
		st, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue
		}
		// The command may hold blanks and parentheses: the last one ends it.
		open, end := bytes.IndexByte(st, '('), bytes.LastIndexByte(st, ')')
		f := strings.Fields(string(st[min(end+1, len(st)):]))
		if open < 0 || end < open || len(f) < 20 {
			continue
		}
		n := func(i int) int64 { v, _ := strconv.ParseInt(f[i], 10, 64); return v }
		began := boot.Add(time.Duration(n(19)) * time.Second / hz)
		cpu := time.Duration(n(11)+n(12)) * time.Second / hz
		pct := int64(0)
		if up := now.Sub(began); up > 0 {
			pct = int64(cpu * 100 / up)
		}
		cmd := string(bytes.TrimRight(bytes.ReplaceAll(readSmall(dir+"/cmdline"), []byte{0}, []byte{' '}), " "))
		if cmd == "" {
			cmd = "[" + string(st[open+1:end]) + "]"
		}
		stime := began.Format("15:04")
		if now.Sub(began) > 24*time.Hour {
			stime = began.Format("Jan02")
		}
		out.Processes = append(out.Processes, []string{
			ownerOf(dir), strconv.Itoa(pid), f[1], strconv.FormatInt(pct, 10), stime, ttyName(n(4)),
			fmt.Sprintf("%02d:%02d:%02d", int(cpu.Hours()), int(cpu.Minutes())%60, int(cpu.Seconds())%60), cmd,
		})
	}
	return out
}

func readSmall(path string) []byte {
	b, _ := os.ReadFile(path)
	return b[:min(len(b), 64<<10)]
}

func bootTime() time.Time {
	for l := range strings.SplitSeq(string(readSmall("/proc/stat")), "\n") {
		if v, ok := strings.CutPrefix(l, "btime "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return time.Unix(n, 0)
		}
	}
	return time.Time{}
}

func ownerOf(dir string) string {
	for l := range strings.SplitSeq(string(readSmall(dir+"/status")), "\n") {
		if v, ok := strings.CutPrefix(l, "Uid:"); ok {
			if f := strings.Fields(v); len(f) > 1 {
				if u, err := user.LookupId(f[1]); err == nil {
					return u.Username
				}
				return f[1]
			}
		}
	}
	return "?"
}

func ttyName(dev int64) string {
	major, minor := dev>>8&0xfff, dev&0xff|dev>>12&0xfff00
	switch {
	case dev == 0:
		return "?"
	case major >= 136 && major <= 143:
		return "pts/" + strconv.FormatInt((major-136)<<8|minor, 10)
	case major == 4:
		return "tty" + strconv.FormatInt(minor, 10)
	}
	return "?"
}
