package qemu

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// unprivileged is whom QEMU runs as where we are root.
type unprivileged struct {
	uid    uint32
	groups []uint32
}

// privateUser picks a user of the machine's own from the range that systemd
// gives to dynamic users, nil where we are nobody special ourselves.
func privateUser(state string) *unprivileged {
	if os.Geteuid() != 0 {
		return nil
	}
	h := fnv.New32a()
	io.WriteString(h, state)
	u := &unprivileged{uid: 61184 + h.Sum32()%4000}
	for range 100 {
		if _, err := user.LookupId(strconv.Itoa(int(u.uid))); err != nil {
			break
		}
		u.uid++
	}
	var st unix.Stat_t
	if unix.Stat("/dev/kvm", &st) == nil && st.Mode&0o060 == 0o060 {
		u.groups = []uint32{st.Gid}
	}
	return u
}

func processAttributes(u *unprivileged) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setsid: true}
	if u != nil {
		a.Credential = &syscall.Credential{Uid: u.uid, Gid: u.uid, Groups: u.groups}
	}
	return a
}

// readableBy opens a file so that anybody who gets the descriptor may open it
// anew: a copy in memory where its mode says otherwise.
func readableBy(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil || fi.Mode()&0o004 != 0 {
		return f, err
	}
	defer f.Close()
	fd, err := unix.MemfdCreate(filepath.Base(path), unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	m := os.NewFile(uintptr(fd), path)
	if _, err := io.Copy(m, f); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// birth tells when a process began, in ticks since boot, 0 if there is none.
func birth(pid int) uint64 {
	if pid <= 0 {
		return 0
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 20 || string(fields[0]) == "Z" {
		return 0
	}
	n, _ := strconv.ParseUint(string(fields[19]), 10, 64)
	return n
}

// findProcess finds the QEMU with the uuid, whose starter could not note it.
func findProcess(uuid string) int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		raw, err := os.ReadFile(d + "/cmdline")
		if err != nil || !bytes.Contains(raw, []byte("\x00-uuid\x00"+uuid+"\x00")) {
			continue
		}
		if exe, _, _ := strings.Cut(string(raw), "\x00"); !strings.Contains(filepath.Base(exe), "qemu") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			return pid
		}
	}
	return 0
}
