package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestChain(t *testing.T) {
	b := newBed(t, nil)
	for _, p := range []string{"one", "two"} {
		b.script(p, `echo "$conf" >>$L.`+p+"\n"+good)
	}
	b.list("10-x.conflist", chain("1.0.0", "x", `{"type":"one","capabilities":{"portMappings":true}}`, "two"))
	ns := newNS(t)
	q := b.ask("c1", ns)
	q.Args = [][2]string{{"A", "b"}}
	q.PortMappings = []PortMapping{{HostPort: 80, ContainerPort: 8080, Protocol: "tcp"}}
	res, err := b.Add(context.Background(), q)
	if err != nil {
		t.Fatal(err)
	}
	in := res.Inside()
	if len(in) != 1 || in[0].Address.String() != "10.1.2.3/24" || in[0].Gateway.String() != "10.1.2.1" || res.MAC("eth0").String() != "02:00:00:00:00:01" || res.Network != "x" {
		t.Errorf("result %+v", res)
	}
	if _, err := b.Add(context.Background(), q); !fault.Is(err, fault.Conflict) {
		t.Errorf("a second attachment of the same name: %v", err)
	}
	if err := b.Check(context.Background(), "c1"); err != nil {
		t.Error(err)
	}
	// Another engine knows what this one did, and what the result was.
	b.open(nil)
	if got := b.Results("c1")["eth0"]; len(got.IPs) != 1 || got.Network != "x" {
		t.Errorf("cached result %+v", got)
	}
	// The configuration may be gone by then.
	os.Remove(filepath.Join(b.conf, "10-x.conflist"))
	b.reload()
	for range 2 { // the second time there is nothing to do
		if err := b.Del(context.Background(), "c1"); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"ADD one c1", "ADD two c1", "CHECK one c1", "CHECK two c1", "DEL two c1", "DEL one c1"}
	if got := b.calls(); !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
	one, _ := os.ReadFile(filepath.Join(b.dir, "log.one"))
	two, _ := os.ReadFile(filepath.Join(b.dir, "log.two"))
	if !strings.Contains(string(one), `"runtimeConfig":{"portMappings":[{"hostPort":80`) || strings.Contains(string(two), "runtimeConfig") {
		t.Errorf("capabilities went to\n%s\n%s", one, two)
	}
	if n := strings.Count(string(two), "prevResult"); n != 3 { // ADD, CHECK, DEL
		t.Errorf("prevResult was given %d times to the second plugin", n)
	}
	b.clean()
}

// What plugins can do wrong when they are asked to connect.
func TestHostileAdd(t *testing.T) {
	add := func(s string) string { return "[ $CNI_COMMAND = ADD ] || exit 0\n" + s }
	result := func(s string) string { return add("echo '" + s + "'") }
	for _, c := range []struct {
		name, body string
		kind       fault.Kind
		text       string
	}{
		{"hangs", add("trap '' TERM; sleep 600 & echo $! >$L.child; sleep 600"), fault.DeadlineExceeded, "did not end in time"},
		{"fails", add(`echo '{"code":7,"msg":"no such bridge","details":"really"}'; exit 1`), fault.Invalid, "no such bridge; really (CNI error 7)"},
		{"later", add(`echo '{"code":11,"msg":"busy"}'; exit 1`), fault.Unavailable, "busy"},
		{"silent", add("exit 3"), fault.Internal, "without saying why: exit status 3"},
		{"mutters", add("echo oh no >&2; exit 3"), fault.Internal, `it said "oh no"`},
		{"garbage", add("head -c 3000 /dev/urandom; exit 1"), fault.Internal, "what is no CNI error"},
		{"terminal", add(`printf '{"code":999,"msg":"\\u001b[31mred\\u0007\\nnext"}'; exit 1`), fault.Internal, "[31mred next"},
		{"empty", add("exit 0"), fault.Internal, "no JSON"},
		{"noise", add("head -c 3000 /dev/urandom"), fault.Internal, ""},
		{"endless", add("exec yes"), fault.Internal, "wrote more than"},
		{"endless diagnosis", add("yes >&2 & sleep 600; wait"), fault.DeadlineExceeded, "did not end in time"},
		{"null", result("null"), fault.Internal, ""},
		{"list", result("[]"), fault.Internal, ""},
		{"null in a list", result(`{"cniVersion":"0.4.0","interfaces":[null]}`), fault.Internal, "null in a list"},
		{"version", result(`{"cniVersion":"9.9.9"}`), fault.Internal, ""},
		{"deep", add(`i=0; while [ $i -lt 300 ]; do printf '{"a":'; i=$((i+1)); done`), fault.Internal, "nested"},
		{"index", result(`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8","interface":7}]}`), fault.Internal, "interface 7, of 0"},
		{"negative", result(`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8","interface":-1}]}`), fault.Internal, "interface -1"},
		{"multicast", result(`{"cniVersion":"1.0.0","ips":[{"address":"224.0.0.1/8"}]}`), fault.Internal, "no container can have"},
		{"nowhere", result(`{"cniVersion":"1.0.0","ips":[{"address":"0.0.0.0/0"}]}`), fault.Internal, "no container can have"},
		{"crowd", add(`printf '{"cniVersion":"1.0.0","ips":['; i=0; while [ $i -lt 300 ]; do printf '{"address":"10.0.0.1/8"},'; i=$((i+1)); done; echo '{"address":"10.0.0.1/8"}]}'`), fault.Internal, "more interfaces"},
		{"signal", add("kill -SEGV $$"), fault.Internal, "segmentation fault"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, func(c *Config) { c.Limits.Add, c.Limits.Output = time.Second, 64<<10 })
			b.script("first", good)
			b.script("bad", c.body)
			b.list("10-x.conflist", chain("1.0.0", "x", "first", "bad"))
			_, err := b.Add(context.Background(), b.ask("c1", newNS(t)))
			if err == nil || fault.Of(err) != c.kind || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "plugin bad") {
				t.Errorf("error %v (%v)", err, fault.Of(err))
			}
			if err != nil && (len(err.Error()) > 4<<10 || strings.ContainsAny(err.Error(), "\x1b\a")) {
				t.Errorf("the error repeats what the plugin wrote: %d bytes", len(err.Error()))
			}
			// What the first did was undone, and so was whatever the second may have.
			if got, want := b.calls(), []string{"ADD first c1", "ADD bad c1", "DEL bad c1", "DEL first c1"}; !slices.Equal(got, want) {
				t.Errorf("calls %q, want %q", got, want)
			}
			if pid, err := os.ReadFile(filepath.Join(b.dir, "log.child")); err == nil {
				n, _ := strconv.Atoi(strings.TrimSpace(string(pid)))
				eventually(t, "the end of what the plugin had started", func() bool {
					st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n))
					return err != nil || strings.Contains(string(st), ") Z ")
				})
			}
			b.clean()
		})
	}
}

// A plugin that leaves somebody behind with its output open has done its work.
func TestDaemonBehind(t *testing.T) {
	b := newBed(t, nil)
	b.script("forks", "[ $CNI_COMMAND = ADD ] && { sleep 60 & echo $! >$L.child; }\n"+good)
	b.list("10-x.conflist", chain("1.0.0", "x", "forks"))
	if _, err := b.Add(context.Background(), b.ask("c1", newNS(t))); err != nil {
		t.Fatal(err)
	}
	pid, _ := os.ReadFile(filepath.Join(b.dir, "log.child"))
	n, err := strconv.Atoi(strings.TrimSpace(string(pid)))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Del(context.Background(), "c1"); err != nil {
		t.Error(err)
	}
	_ = syscall.Kill(n, syscall.SIGKILL)
	b.clean()
}

// Teardown ends, whatever the plugins do.
func TestDelGoesOn(t *testing.T) {
	for _, c := range []struct{ name, body string }{
		{"fails", "exit 1"},
		{"hangs", "sleep 600"},
		{"garbage", "head -c 100 /dev/urandom; exit 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, func(c *Config) { c.Limits.Del = 300 * time.Millisecond })
			b.run()
			b.script("last", good)
			b.script("bad", "[ $CNI_COMMAND = DEL ] && [ ! -e $L.mended ] && { "+c.body+"; }\n"+good)
			b.script("first", good)
			b.list("10-x.conflist", chain("1.0.0", "x", "first", "bad", "last"))
			if _, err := b.Add(context.Background(), b.ask("c1", newNS(t))); err != nil {
				t.Fatal(err)
			}
			if err := b.Del(context.Background(), "c1"); err == nil || !strings.Contains(err.Error(), "plugin bad") {
				t.Errorf("the failure is not told: %v", err)
			}
			if got := b.calls()[3:6]; !slices.Equal(got, []string{"DEL last c1", "DEL bad c1", "DEL first c1"}) {
				t.Errorf("the others did not get their turn: %q", got)
			}
			if !b.Has("c1") {
				t.Error("an attachment that could not be undone is forgotten")
			}
			write(t, filepath.Join(b.dir, "log.mended"), "")
			eventually(t, "the next attempt", func() bool { return !b.Has("c1") })
			b.clean()
		})
	}
}

func TestDelGivesUp(t *testing.T) {
	b := newBed(t, func(c *Config) { c.Limits.GiveUp = 300 * time.Millisecond })
	b.run()
	b.script("bad", "[ $CNI_COMMAND = DEL ] && exit 1\n"+good)
	b.list("10-x.conflist", chain("1.0.0", "x", "bad"))
	if _, err := b.Add(context.Background(), b.ask("c1", newNS(t))); err != nil {
		t.Fatal(err)
	}
	if err := b.Del(context.Background(), "c1"); err == nil {
		t.Error("no error")
	}
	eventually(t, "giving up", func() bool { return !b.Has("c1") })
	if n := len(b.calls()); n < 4 {
		t.Errorf("it was tried %d times", n-1)
	}
	b.clean()
}

func TestDelWithoutPlugin(t *testing.T) {
	b := newBed(t, nil)
	b.script("stays", good)
	b.script("goes", good)
	// The plugins answer in a newer version than the configuration's.
	b.list("10-x.conflist", chain("0.4.0", "x", "stays", "goes"))
	if _, err := b.Add(context.Background(), b.ask("c1", newNS(t))); err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(b.bin, "goes"))
	if err := b.Status(context.Background(), "x"); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), `"goes"`) {
		t.Errorf("status %v", err)
	}
	if err := b.Del(context.Background(), "c1"); err != nil {
		t.Error(err)
	}
	if _, err := b.Add(context.Background(), b.ask("c1", newNS(t))); !fault.Is(err, fault.NotFound) {
		t.Errorf("ADD without the plugin: %v", err)
	}
	b.clean()
}

// The engine is killed while a plugin runs: the next one waits for the plugin
// and then undoes what it did.
func TestKilledEngine(t *testing.T) {
	b := newBed(t, nil)
	b.script("slow", `[ $CNI_COMMAND = ADD ] && { echo >$L.began; sleep 1; echo ended >>$L; }`+"\n"+good)
	b.list("10-x.conflist", chain("1.0.0", "x", "slow"))
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SERVIN_TEST_ENGINE="+b.dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the plugin's start", func() bool { _, err := os.Stat(b.dir + "/log.began"); return err == nil })
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	b.open(func(c *Config) { c.Limits.Grace = 10 * time.Second })
	if !b.Has("c1") || len(b.Results("c1")) != 0 {
		t.Error("the unfinished attachment is not on record")
	}
	b.run()
	eventually(t, "undoing", func() bool { return !b.Has("c1") })
	if got, want := b.calls(), []string{"ADD slow c1", "ended", "DEL slow c1"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
	b.clean()
}

// engineChild is the engine that TestKilledEngine kills.
func engineChild() int {
	dir := os.Getenv("SERVIN_TEST_ENGINE")
	s, err := New(Config{ConfDir: dir + "/net.d", BinDirs: []string{dir + "/bin"}, Root: dir + "/root", RunRoot: dir + "/run"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return 1
	}
	_, err = s.Add(context.Background(), Request{Owner: Containers, ContainerID: "c1", IfName: "eth0", NS: ns})
	fmt.Fprintln(os.Stderr, "not killed:", err)
	return 1
}

// After a restart, what lives stays and what does not is undone.
func TestRestore(t *testing.T) {
	b := newBed(t, nil)
	b.script("p", `[ $CNI_COMMAND = DEL ] && echo "netns=$CNI_NETNS" >>$L`+"\n"+good)
	b.list("10-x.conflist", chain("1.0.0", "x", "p"))
	for _, id := range []string{"lives", "died", "pod"} {
		q := b.ask(id, newNS(t))
		if id == "pod" {
			q.Owner = Pods
		}
		if _, err := b.Add(context.Background(), q); err != nil {
			t.Fatal(err)
		}
	}
	// The host was restarted as far as this one is concerned.
	if err := b.pins.drop("died"); err != nil {
		t.Fatal(err)
	}
	b.open(nil)
	b.run()
	b.Restore(Containers, func(id string) bool { return id == "lives" })
	eventually(t, "undoing", func() bool { return !b.Has("died") })
	if !b.Has("lives") || !b.Has("pod") {
		t.Error("what lives, or is another's, was undone")
	}
	if got := b.calls()[3:]; !slices.Equal(got, []string{"DEL p died", "netns="}) {
		t.Errorf("calls %q", got)
	}
	b.Restore(Pods, func(string) bool { return false })
	eventually(t, "undoing", func() bool { return !b.Has("pod") })
	if err := b.Del(context.Background(), "lives"); err != nil {
		t.Error(err)
	}
	b.clean()
}

func TestCancelledAdd(t *testing.T) {
	b := newBed(t, nil)
	b.script("slow", "[ $CNI_COMMAND = ADD ] && { echo >$L.began; sleep 600; }\n"+good)
	b.list("10-x.conflist", chain("1.0.0", "x", "slow"))
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		eventually(t, "the plugin's start", func() bool { _, err := os.Stat(b.dir + "/log.began"); return err == nil })
		cancel()
	}()
	if _, err := b.Add(ctx, b.ask("c1", newNS(t))); err == nil {
		t.Error("no error")
	}
	if got, want := b.calls(), []string{"ADD slow c1", "DEL slow c1"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
	b.clean()
}

func TestBadRequests(t *testing.T) {
	b := newBed(t, nil)
	b.script("p", good)
	b.list("10-x.conflist", chain("1.0.0", "x", "p"))
	ns := newNS(t)
	for name, edit := range map[string]func(*Request){
		"id":        func(q *Request) { q.ContainerID = "../x" },
		"no id":     func(q *Request) { q.ContainerID = "" },
		"interface": func(q *Request) { q.IfName = "a/b" },
		"long":      func(q *Request) { q.IfName = strings.Repeat("a", 16) },
		"argument":  func(q *Request) { q.Args = [][2]string{{"A", "b;CNI_COMMAND=DEL"}} },
		"key":       func(q *Request) { q.Args = [][2]string{{"A=b", "c"}} },
		"port":      func(q *Request) { q.PortMappings = []PortMapping{{HostPort: 0, ContainerPort: 1, Protocol: "tcp"}} },
		"protocol":  func(q *Request) { q.PortMappings = []PortMapping{{HostPort: 1, ContainerPort: 1, Protocol: "TCP;"}} },
		"mac":       func(q *Request) { q.MAC = "x" },
		"guid":      func(q *Request) { q.InfinibandGUID = "02:00:00:00:00:01" },
		"range":     func(q *Request) { q.IPRanges = [][]IPRange{{{Subnet: "x"}}} },
		"address":   func(q *Request) { q.IPs = []string{"10.0.0.1/99"} },
		"extra":     func(q *Request) { q.Extra = map[string]json.RawMessage{"a": json.RawMessage("{")} },
		"no ns":     func(q *Request) { q.NS, q.NetNS = nil, "x" },
		"no owner":  func(q *Request) { q.Owner = "" },
	} {
		q := b.ask("c1", ns)
		edit(&q)
		if _, err := b.Add(context.Background(), q); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	q := b.ask("c1", ns)
	q.Network = "y"
	if _, err := b.Add(context.Background(), q); !fault.Is(err, fault.NotFound) {
		t.Errorf("unknown network: %v", err)
	}
	if got := b.calls(); !slices.Equal(got, []string{""}) {
		t.Errorf("plugins ran: %q", got)
	}
	b.clean()
}

func TestManyAtOnce(t *testing.T) {
	b := newBed(t, nil)
	b.script("p", good)
	b.list("10-x.conflist", chain("1.0.0", "x", "p"))
	const n = 20
	errs := make(chan error, n)
	for i := range n {
		ns := newNS(t)
		go func() {
			id := "c" + strconv.Itoa(i%(n/2)) // two go for each name
			_, err := b.Add(context.Background(), b.ask(id, ns))
			if err == nil {
				err = b.Del(context.Background(), id)
			} else if fault.Is(err, fault.Conflict) {
				err = nil
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if len(b.locks) > 0 {
		t.Errorf("turns stay: %v", b.locks)
	}
	b.clean()
}
