package rootless

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The user-mode networks that join the holder's namespace to the host's.
const (
	Pasta = "pasta"
	Slirp = "slirp4netns"
)

// SlirpGuest is the namespace's address behind slirp4netns, where connections
// to forwarded ports arrive.
var SlirpGuest = netip.AddrFrom4([4]byte{10, 0, 2, 100})

// link is the process that does so; a network without one is loopback alone.
type link struct {
	Kind string `json:",omitempty"`
	process
}

// connect joins the holder's network namespace to the host's network. What goes
// wrong is said, and leaves the engine without a network beyond it.
func connect(pid int, runRoot string, warn func(string)) link {
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		warn(fmt.Sprintf("containers have no network beyond this engine: %v (it takes mode 0666 and the module tun)", err))
		return link{}
	} else {
		f.Close()
	}
	var failed []string
	for _, n := range []struct {
		kind  string
		start func(path string, pid int, runRoot string) (int, error)
	}{{Pasta, startPasta}, {Slirp, startSlirp}} {
		path, err := exec.LookPath(n.kind)
		if err != nil {
			continue
		}
		p, err := n.start(path, pid, runRoot)
		if err == nil {
			return link{Kind: n.kind, process: identify(p)}
		}
		failed = append(failed, fmt.Sprintf("%s: %v", n.kind, err))
	}
	if len(failed) == 0 {
		failed = []string{"neither pasta nor slirp4netns is installed (Debian packages: passt, slirp4netns)"}
	}
	warn("containers have no network beyond this engine: " + strings.Join(failed, "; "))
	return link{}
}

// startPasta starts pasta, which copies the host's addresses and routes and by
// itself forwards the ports that are listened on inside. The gateway does not
// stand for the host's loopback, where services trust whoever reaches them.
func startPasta(path string, pid int, runRoot string) (int, error) {
	file := filepath.Join(runRoot, "pasta.pid")
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	cmd := exec.Command(path, "--config-net", "--quiet", "--no-map-gw", "--pid", file, strconv.Itoa(pid))
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%w: %s", err, complaint(string(out)))
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// complaint is what pasta said, without its trouble about a missing system log.
func complaint(out string) string {
	var lines []string
	for l := range strings.Lines(out) {
		if l = strings.TrimSpace(l); l != "" && !strings.HasSuffix(l, "to syslog") {
			lines = append(lines, l)
		}
	}
	return strings.Join(lines, ", ")
}

// startSlirp starts slirp4netns and waits until its link is up.
func startSlirp(path string, pid int, runRoot string) (int, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	log, err := os.OpenFile(filepath.Join(runRoot, "slirp4netns.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		w.Close()
		return 0, err
	}
	defer log.Close()
	sock := slirpSocket(runRoot)
	if err := os.Remove(sock); err != nil && !errors.Is(err, os.ErrNotExist) {
		w.Close()
		return 0, err
	}
	cmd := exec.Command(path, "--configure", "--mtu=65520", "--disable-host-loopback", "--ready-fd=3", "--api-socket", sock, strconv.Itoa(pid), "tap0")
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, err
	}
	if err = r.SetReadDeadline(time.Now().Add(10 * time.Second)); err == nil {
		err = expect(r, '1')
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		said, _ := os.ReadFile(log.Name())
		return 0, fmt.Errorf("it ended early: %s", strings.TrimSpace(strings.ReplaceAll(string(said), "\n", ", ")))
	}
	return cmd.Process.Pid, nil
}

func slirpSocket(runRoot string) string { return filepath.Join(runRoot, "slirp4netns.sock") }

// Forwarder has slirp4netns listen on the host for a published port. pasta needs
// no telling.
type Forwarder struct{ socket string }

// Forwarder returns what must be told of published ports, nil if nobody.
func (s State) Forwarder(runRoot string) *Forwarder {
	if s.Link != Slirp {
		return nil
	}
	return &Forwarder{socket: slirpSocket(runRoot)}
}

// Add listens on an address of the host (the zero one is all) and returns the
// forwarding's number. In the namespace connections arrive at slirp4netns's
// address for its guest.
func (f *Forwarder) Add(proto string, addr netip.AddrPort) (int, error) {
	args := map[string]any{"proto": proto, "host_addr": addr.Addr().String(), "host_port": addr.Port(), "guest_port": addr.Port()}
	var answer struct {
		ID int `json:"id"`
	}
	if err := f.call("add_hostfwd", args, &answer); err != nil {
		return 0, fmt.Errorf("cannot publish %s/%s: %w", addr, proto, err)
	}
	return answer.ID, nil
}

// Reset ends all forwardings.
func (f *Forwarder) Reset() error {
	var answer struct {
		Entries []struct {
			ID int `json:"id"`
		} `json:"entries"`
	}
	err := f.call("list_hostfwd", map[string]any{}, &answer)
	for _, e := range answer.Entries {
		err = errors.Join(err, f.Remove(e.ID))
	}
	return err
}

// Remove ends a forwarding.
func (f *Forwarder) Remove(id int) error {
	return f.call("remove_hostfwd", map[string]any{"id": id}, nil)
}

func (f *Forwarder) call(command string, args map[string]any, answer any) error {
	c, err := net.DialTimeout("unix", f.socket, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if err := json.NewEncoder(c).Encode(map[string]any{"execute": command, "arguments": args}); err != nil {
		return err
	}
	var reply struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Desc string `json:"desc"`
		} `json:"error"`
	}
	if err := json.NewDecoder(c).Decode(&reply); err != nil {
		return err
	}
	if reply.Error != nil {
		return errors.New("slirp4netns: " + reply.Error.Desc)
	}
	if answer == nil || reply.Return == nil {
		return nil
	}
	return json.Unmarshal(reply.Return, answer)
}

// resolvConf writes the name servers that can be reached from inside: a server
// on the host's loopback cannot, but systemd-resolved tells whom it asks itself.
func resolvConf(l link, runRoot string) error {
	file := filepath.Join(runRoot, resolvName)
	data := reachable("/etc/resolv.conf")
	if data == nil {
		data = reachable("/run/systemd/resolve/resolv.conf")
	}
	if data == nil && l.Kind == Slirp {
		data = []byte("nameserver 10.0.2.3\n") // slirp4netns's own
	}
	if data == nil {
		err := os.Remove(file)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	return os.WriteFile(file, data, 0o644)
}

const resolvName = "resolv.conf"

// reachable is the file's text if it names a server that is not on loopback.
func reachable(path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && !a.IsLoopback() {
			return data
		}
	}
	return nil
}
