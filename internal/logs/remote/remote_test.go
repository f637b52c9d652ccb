package remote

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tinylib/msgp/msgp"

	"github.com/cloudos-io/cloudos/internal/logs/driver"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// rig is a shipper on a directory that outlives it.
type rig struct {
	t       *testing.T
	dir     string
	journal string
	keep    time.Duration
	s       *Shipper
	out     *lockedBuffer
	stop    func()
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, dir: filepath.Join(t.TempDir(), "remote"), out: &lockedBuffer{}}
	t.Cleanup(func() { r.halt() })
	return r
}

func (r *rig) start() *Shipper {
	r.t.Helper()
	s, err := New(Config{Dir: r.dir, JournalSocket: r.journal, Keep: r.keep, Logger: slog.New(slog.NewTextHandler(r.out, nil))})
	must(r.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	r.s = s
	r.stop = func() { cancel(); <-done }
	return s
}

func (r *rig) halt() {
	if r.stop != nil {
		r.stop()
		r.stop = nil
	}
}

const cid = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"

func source(t *testing.T, name string, o map[string]string) Source {
	t.Helper()
	_, err := driver.Parse(name, o, driver.Defaults{MaxFiles: 1})
	must(t, err)
	s, err := NewSource(name, o, driver.Container{ContainerID: cid, ContainerName: "/web", ContainerImageName: "nginx:1",
		ContainerLabels: map[string]string{"team": "red"}, ContainerEnv: []string{"MODE=fast"}})
	must(t, err)
	return s
}

// say appends what a monitor would.
func (r *rig) say(from, to int) {
	r.t.Helper()
	f, err := os.OpenFile(filepath.Join(r.dir, cid, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	must(r.t, err)
	defer f.Close()
	for i := from; i < to; i++ {
		stream := []string{"stdout", "stderr"}[i%2]
		_, err := fmt.Fprintf(f, `{"log":"line %d\n","stream":%q,"time":"2026-01-02T03:04:05.%09dZ"}`+"\n", i, stream, i+1)
		must(r.t, err)
	}
}

func lines(from, to int) []string {
	var l []string
	for i := from; i < to; i++ {
		l = append(l, fmt.Sprintf("line %d", i))
	}
	return l
}

// receiver takes what a stream carries; it can be closed and opened again.
type receiver struct {
	t    *testing.T
	addr string
	l    net.Listener
	mu   sync.Mutex
	got  []string
	cons []net.Conn
	each func(c net.Conn, got func(string))
}

func (r *receiver) open() {
	r.t.Helper()
	l, err := net.Listen("tcp", r.addr)
	must(r.t, err)
	r.l, r.addr = l, l.Addr().String()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.cons = append(r.cons, c)
			r.mu.Unlock()
			go r.each(c, func(s string) {
				r.mu.Lock()
				r.got = append(r.got, s)
				r.mu.Unlock()
			})
		}
	}()
	r.t.Cleanup(r.shut)
}

func (r *receiver) shut() {
	r.l.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.cons {
		c.Close()
	}
	r.cons = nil
}

func (r *receiver) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

func readLines(c net.Conn, got func(string)) {
	sc := bufio.NewScanner(c)
	for sc.Scan() {
		got(sc.Text())
	}
}

// messages are what is behind the header of each.
func messages(l []string) []string {
	var out []string
	for _, s := range l {
		if i := strings.LastIndex(s, "line "); i >= 0 {
			out = append(out, s[i:])
		}
	}
	return out
}

func TestSyslogSurvivesOutageAndRestart(t *testing.T) {
	in := &receiver{t: t, addr: "127.0.0.1:0", each: readLines}
	in.open()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Syslog, map[string]string{"syslog-address": "tcp://" + in.addr, "syslog-format": "rfc5424", "tag": "{{.Name}}"})))
	s.Started(cid)
	r.say(0, 10)
	eventually(t, "ten lines arrive", func() bool { return len(in.all()) == 10 })
	host, _ := os.Hostname()
	stamp := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Local().Format(time.RFC3339)
	if want := fmt.Sprintf("<30>1 %s %s web %d web - line 0", stamp, host, os.Getpid()); in.all()[0] != want {
		t.Errorf("got %q, want %q", in.all()[0], want)
	}
	if !strings.HasPrefix(in.all()[1], "<27>1 ") {
		t.Errorf("stderr comes as %q", in.all()[1])
	}
	in.shut()
	r.say(10, 20)
	eventually(t, "the outage shows", func() bool { return s.Status().Trouble[cid] != "" && s.Status().Backlog[cid] > 0 })
	r.halt() // the engine ends while the remote is away
	r.say(20, 30)
	in.open()
	s = r.start()
	eventually(t, "all arrive", func() bool { return len(messages(in.all())) >= 30 })
	if got := messages(in.all()); !slices.Equal(got, lines(0, 30)) {
		t.Errorf("got %q", got)
	}
	// It takes the container over, and goes on after it has ended and started again.
	s.Started(cid)
	r.say(30, 35)
	s.Ended(cid)
	eventually(t, "the flow ends", func() bool { return len(s.Status().Backlog) == 0 })
	s.Started(cid)
	r.say(35, 40)
	eventually(t, "forty", func() bool { return len(in.all()) == 40 })
	must(t, s.Retire(cid))
	eventually(t, "the directory goes", func() bool { _, err := os.Stat(filepath.Join(r.dir, cid)); return errors.Is(err, os.ErrNotExist) })
	if got := messages(in.all()); !slices.Equal(got, lines(0, 40)) {
		t.Errorf("got %q", got)
	}
	r.halt()
	if s.sent.Load() == 0 || s.lost.Load() != 0 {
		t.Errorf("sent %d, lost %d", s.sent.Load(), s.lost.Load())
	}
	if out := r.out.String(); !strings.Contains(out, "is sent again") && !strings.Contains(out, "is kept and tried again") {
		t.Errorf("the log does not tell: %s", out)
	}
}

func TestRemovedContainersLogIsStillSent(t *testing.T) {
	in := &receiver{t: t, addr: "127.0.0.1:0", each: readLines}
	in.open()
	addr := in.addr
	in.shut()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Syslog, map[string]string{"syslog-address": "tcp://" + addr})))
	s.Started(cid)
	r.say(0, 5)
	s.Ended(cid)
	must(t, s.Retire(cid))
	eventually(t, "it tries", func() bool { return s.Status().Failures > 0 })
	r.halt()
	in.open()
	r.start()
	eventually(t, "the rest arrives", func() bool { return slices.Equal(messages(in.all()), lines(0, 5)) })
	eventually(t, "the directory goes", func() bool { _, err := os.Stat(filepath.Join(r.dir, cid)); return errors.Is(err, os.ErrNotExist) })
}

func TestRemovedContainersLogIsNotKeptForEver(t *testing.T) {
	r := newRig(t)
	r.keep = 300 * time.Millisecond
	s := r.start()
	must(t, s.Prepare(source(t, driver.Fluentd, map[string]string{"fluentd-address": "127.0.0.1:1"})))
	s.Started(cid)
	r.say(0, 5)
	must(t, s.Retire(cid))
	eventually(t, "the directory goes", func() bool { _, err := os.Stat(filepath.Join(r.dir, cid)); return errors.Is(err, os.ErrNotExist) })
	if s.Status().Lost != 1 || !strings.Contains(r.out.String(), "away for too long") {
		t.Errorf("the loss is not told: %+v\n%s", s.Status(), r.out.String())
	}
}

func TestRetainRetiresTheUnknown(t *testing.T) {
	in := &receiver{t: t, addr: "127.0.0.1:0", each: readLines}
	in.open()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Syslog, map[string]string{"syslog-address": "tcp://" + in.addr})))
	r.say(0, 3)
	r.halt()
	s = r.start()
	must(t, s.Retain(func(string) bool { return false }))
	eventually(t, "the directory goes", func() bool { _, err := os.Stat(filepath.Join(r.dir, cid)); return errors.Is(err, os.ErrNotExist) })
	if got := messages(in.all()); !slices.Equal(got, lines(0, 3)) {
		t.Errorf("got %q", got)
	}
}

// fluent reads the forward protocol; ack acknowledges chunks.
func fluent(ack bool) func(net.Conn, func(string)) {
	return func(c net.Conn, got func(string)) {
		in := msgp.NewReader(c)
		for {
			v, err := in.ReadIntf()
			if err != nil {
				return
			}
			m, ok := v.([]any)
			if !ok || len(m) < 2 {
				got(fmt.Sprintf("malformed %v", v))
				return
			}
			entries := [][]any{}
			option := 3
			if list, ok := m[1].([]any); ok {
				option = 2
				for _, e := range list {
					entries = append(entries, e.([]any))
				}
			} else {
				entries = append(entries, m[1:3])
			}
			for _, e := range entries {
				at := ""
				switch x := e[0].(type) {
				case int64:
					at = fmt.Sprint(x)
				case *msgp.RawExtension:
					at = fmt.Sprintf("ext%d:%x", x.Type, x.Data)
				default:
					at = fmt.Sprintf("%T", x)
				}
				b, _ := json.Marshal(e[1])
				got(fmt.Sprintf("%v %s %s", m[0], at, b))
			}
			if ack && len(m) > option {
				chunk := m[option].(map[string]any)["chunk"].(string)
				w := msgp.NewWriter(c)
				_ = w.WriteMapStrStr(map[string]string{"ack": chunk})
				_ = w.Flush()
			}
		}
	}
}

func fluentLines(l []string) []string {
	var out []string
	for _, s := range l {
		_, j, _ := strings.Cut(s, "{")
		var m map[string]string
		if json.Unmarshal([]byte("{"+j), &m) == nil {
			out = append(out, m["log"])
		}
	}
	return out
}

func TestFluentd(t *testing.T) {
	in := &receiver{t: t, addr: "127.0.0.1:0", each: fluent(false)}
	in.open()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Fluentd, map[string]string{"fluentd-address": in.addr, "tag": "docker.{{.Name}}", "labels": "team", "env": "MODE"})))
	r.say(0, 40)
	s.Started(cid)
	eventually(t, "all arrive", func() bool { return len(in.all()) == 40 })
	want := `docker.web 1767323045 {"MODE":"fast","container_id":"` + cid + `","container_name":"/web","log":"line 0","source":"stdout","team":"red"}`
	if got := in.all(); got[0] != want || !slices.Equal(fluentLines(got), lines(0, 40)) {
		t.Errorf("got %q, want %q", got[0], want)
	}
	r.say(40, 41) // one alone
	eventually(t, "one more", func() bool { return len(in.all()) == 41 })
}

func TestFluentdAcknowledged(t *testing.T) {
	// The first connection takes a chunk, does not acknowledge it, and ends.
	var first sync.Once
	in := &receiver{t: t, addr: "127.0.0.1:0"}
	in.each = func(c net.Conn, got func(string)) {
		cut := false
		first.Do(func() { cut = true })
		if cut {
			_, _ = io.ReadFull(c, make([]byte, 10))
			c.Close()
			return
		}
		fluent(true)(c, got)
	}
	in.open()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Fluentd, map[string]string{"fluentd-address": "tcp://" + in.addr, "fluentd-request-ack": "true", "fluentd-sub-second-precision": "true"})))
	r.say(0, 25)
	s.Started(cid)
	eventually(t, "all arrive", func() bool { return len(in.all()) == 25 })
	if got := in.all(); !slices.Equal(fluentLines(got), lines(0, 25)) || !strings.HasPrefix(got[0], cid[:12]+" ext0:695735a500000001 ") {
		t.Errorf("got %q", got)
	}
	s.Ended(cid)
	eventually(t, "the flow ends", func() bool { return len(s.Status().Backlog) == 0 })
}

func TestPartialLines(t *testing.T) {
	in := &receiver{t: t, addr: "127.0.0.1:0", each: fluent(false)}
	in.open()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Fluentd, map[string]string{"fluentd-address": in.addr})))
	f := ""
	for i, x := range []string{"a", "b", `c\n`, `whole\n`} {
		f += fmt.Sprintf(`{"log":"%s","stream":"stdout","time":"2026-01-02T03:04:05.%09dZ"}`+"\n", x, i+1)
	}
	must(t, os.WriteFile(filepath.Join(r.dir, cid, "log"), []byte(f), 0o640))
	s.Started(cid)
	eventually(t, "all arrive", func() bool { return len(in.all()) == 4 })
	var ids []string
	for i, want := range []string{"1 false", "2 false", "3 true", " "} {
		_, j, _ := strings.Cut(in.all()[i], "{")
		var m map[string]string
		must(t, json.Unmarshal([]byte("{"+j), &m))
		if got := m["partial_ordinal"] + " " + m["partial_last"]; got != want {
			t.Errorf("record %d is %q, want %q", i, got, want)
		}
		ids = append(ids, m["partial_id"])
	}
	if ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] || ids[3] != "" {
		t.Errorf("ids of the pieces: %q", ids)
	}
}

// daemon runs a program until the test ends.
func daemon(t *testing.T, argv ...string) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Fatalf("%s is missing: run scripts/deps test", argv[0])
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said: %s", argv[0], out.String())
		}
	})
	return cmd
}

func TestRsyslogReceives(t *testing.T) {
	dir := t.TempDir()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := free.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	free.Close()
	out := filepath.Join(dir, "out")
	must(t, os.WriteFile(filepath.Join(dir, "conf"), []byte(`
module(load="imuxsock" SysSock.Use="off")
module(load="imtcp")
module(load="imudp")
input(type="imuxsock" Socket="`+dir+`/dgram" CreatePath="on")
input(type="imtcp" port="`+port+`" address="127.0.0.1")
input(type="imudp" port="`+port+`" address="127.0.0.1")
template(name="all" type="string" string="%syslogfacility-text%.%syslogseverity-text% %programname% %msg:::drop-last-lf%\n")
action(type="omfile" file="`+out+`" template="all")
`), 0o644))
	daemon(t, "/usr/sbin/rsyslogd", "-n", "-f", dir+"/conf", "-i", dir+"/pid")
	eventually(t, "rsyslogd listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		_, serr := os.Stat(dir + "/dgram")
		return err == nil && serr == nil
	})
	for _, c := range []struct{ address, format string }{
		{"tcp://" + addr, "rfc5424"}, {"tcp://" + addr, "rfc5424micro"}, {"tcp://" + addr, "rfc3164"}, {"tcp://" + addr, ""},
		{"udp://" + addr, "rfc5424"}, {"unixgram://" + dir + "/dgram", ""},
	} {
		t.Run(c.address[:4]+c.format, func(t *testing.T) {
			_ = os.Truncate(out, 0)
			r := newRig(t)
			s := r.start()
			must(t, s.Prepare(source(t, driver.Syslog, map[string]string{"syslog-address": c.address, "syslog-format": c.format, "syslog-facility": "local3", "tag": "shop"})))
			r.say(0, 4)
			s.Started(cid)
			s.Ended(cid)
			want := "local3.info shop line 0\nlocal3.err shop line 1\nlocal3.info shop line 2\nlocal3.err shop line 3\n"
			got := ""
			eventually(t, "rsyslogd wrote all", func() bool {
				b, _ := os.ReadFile(out)
				// Formats differ in the blank that begins the message.
				got = strings.ReplaceAll(string(b), "  ", " ")
				return strings.Count(got, "\n") >= 4
			})
			if got != want {
				t.Errorf("rsyslogd got %q, want %q", got, want)
			}
		})
	}
}

func TestJournalReceives(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/machine-id", []byte("0123456789abcdef0123456789abcdef\n"), 0o444))
	must(t, os.WriteFile(dir+"/journald.conf", []byte("[Journal]\nReadKMsg=no\nAudit=no\nStorage=volatile\nRuntimeMaxUse=8M\n"), 0o644))
	if _, err := os.Stat("/etc/machine-id"); err != nil {
		t.Skip("SKIP: the host has no /etc/machine-id to mount over")
	}
	cmd := daemon(t, "unshare", "-m", "sh", "-ec", `mount --make-rprivate /
mount --bind `+dir+`/machine-id /etc/machine-id
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
mount --bind `+dir+`/journald.conf /etc/systemd/journald.conf
exec /lib/systemd/systemd-journald`)
	root := fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)
	r := newRig(t)
	r.journal = root + "/run/systemd/journal/socket"
	eventually(t, "journald listens", func() bool {
		m, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
		_, err := os.Stat(r.journal)
		return err == nil && strings.HasPrefix(string(m), "systemd-journal")
	})
	s := r.start()
	must(t, s.Prepare(source(t, driver.Journald, map[string]string{"tag": "{{.Name}}", "labels": "team"})))
	r.say(0, 3)
	// One that no datagram holds goes as a file.
	long := strings.Repeat("x", 600<<10)
	f, err := os.OpenFile(s.Path(cid), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = fmt.Fprintf(f, `{"log":"%s\n","stream":"stdout","time":"2026-01-02T03:04:06Z"}`+"\n", long)
	must(t, errors.Join(err, f.Close()))
	s.Started(cid)
	var recs []map[string]any
	eventually(t, "the journal has all", func() bool {
		out, _ := exec.Command("journalctl", "-a", "-q", "-D", root+"/run/log/journal", "-o", "json", "--all", "CONTAINER_ID_FULL="+cid).Output()
		recs = nil
		for l := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n") {
			var m map[string]any
			if json.Unmarshal([]byte(l), &m) == nil {
				recs = append(recs, m)
			}
		}
		return len(recs) == 4
	})
	for k, want := range map[string]string{"MESSAGE": "line 1", "PRIORITY": "3", "CONTAINER_ID": cid[:12], "CONTAINER_NAME": "web", "CONTAINER_TAG": "web",
		"SYSLOG_IDENTIFIER": "web", "IMAGE_NAME": "nginx:1", "TEAM": "red", "SYSLOG_TIMESTAMP": "2026-01-02T03:04:05.000000002Z", "CONTAINER_LOG_ORDINAL": "2"} {
		if recs[1][k] != want {
			t.Errorf("%s is %v, want %q", k, recs[1][k], want)
		}
	}
	if recs[3]["MESSAGE"] != long {
		t.Errorf("the long record came as %.80v", recs[3]["MESSAGE"])
	}
	must(t, s.Retire(cid))
	eventually(t, "the directory goes", func() bool { _, err := os.Stat(filepath.Join(r.dir, cid)); return errors.Is(err, os.ErrNotExist) })
}

func TestJournalMissing(t *testing.T) {
	r := newRig(t)
	r.journal = t.TempDir() + "/none"
	if err := r.start().Prepare(source(t, driver.Journald, nil)); err == nil || !strings.Contains(err.Error(), "journald is not enabled on this host") {
		t.Errorf("got %v", err)
	}
}

func FuzzReadAck(f *testing.F) {
	f.Add([]byte("\x81\xa3ack\xa1x"))
	f.Add([]byte("\x81\xa3ack\xd9\x01x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = readAck(bufio.NewReader(bytes.NewReader(b)), "x")
	})
}

func TestJournalFieldNames(t *testing.T) {
	for in, want := range map[string]string{"team": "TEAM", "com.x-y": "COM_X_Y", "_a": "A", "9": "9", "": ""} {
		if got := journalField(in); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
	if got := string(appendField(appendField(nil, "9A", []byte("x")), "A", []byte("b\nc"))); got != "A\n\x03\x00\x00\x00\x00\x00\x00\x00b\nc\n" {
		t.Errorf("got %q", got)
	}
}
