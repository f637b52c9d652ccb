package network

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	mnetwork "github.com/moby/moby/api/types/network"
)

func TestParseRate(t *testing.T) {
	for s, want := range map[string]uint64{"8kbit": 1000, "100mbit": 12500000, "1gbit": 125000000, "1.5Mbit": 187500, "10mbps": 10000000, "80000": 10000, "0": 0, "unlimited": 0, "1mibit": 131072} {
		if got, err := parseRate(s); err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "fast", "10", "-1mbit", "1xbit", "1e99", "10mbits", "nan", "9999tbit"} {
		if got, err := parseRate(s); err == nil {
			t.Errorf("%q gives %d", s, got)
		}
	}
}

func TestOwnOptions(t *testing.T) {
	known := []string{optBandwidth, optVIP}
	for o, ok := range map[string]bool{optBandwidth: true, optVIP: true, "com.docker.network.anything": true, "plain": true, "com.servin.network.bandwith": false, optEndpointVIP: false} {
		if err := checkOwn(map[string]string{o: "x"}, known...); (err == nil) != ok {
			t.Errorf("%s: %v", o, err)
		} else if err != nil && (!fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), o)) {
			t.Errorf("%s: %v", o, err)
		}
	}
}

// pour sends from one place to another for a while and tells bytes a second.
func pour(t *testing.T, from, to *os.File, addr string) float64 {
	t.Helper()
	var ln net.Listener
	in(t, to, func() (err error) { ln, err = net.Listen("tcp", addr+":9999"); return err })
	defer ln.Close()
	done := make(chan int64, 1)
	begin := make(chan time.Time, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			done <- 0
			return
		}
		defer c.Close()
		begin <- time.Now()
		n, _ := io.Copy(io.Discard, c)
		done <- n
	}()
	var c net.Conn
	in(t, from, func() (err error) { c, err = net.DialTimeout("tcp", addr+":9999", 5*time.Second); return err })
	_ = c.SetDeadline(time.Now().Add(1500 * time.Millisecond))
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Write(b); err != nil {
			break
		}
	}
	c.Close()
	n := <-done
	return float64(n) / time.Since(<-begin).Seconds()
}

func TestBandwidth(t *testing.T) {
	m := newManager(t, nil)
	ctx := context.Background()
	create(t, m, mnetwork.CreateRequest{Name: "slow", Options: map[string]string{optBandwidth: "16mbit"}})
	a, b, c := newNS(t), newNS(t), newNS(t)
	aa := attach(t, m, a, "a", "slow", nil)
	bb := attach(t, m, b, "b", "slow", func(r *AttachRequest) {
		r.Settings = &mnetwork.EndpointSettings{DriverOpts: map[string]string{optBandwidth: "unlimited"}}
	})
	cc := attach(t, m, c, "c", "slow", func(r *AttachRequest) {
		r.Settings = &mnetwork.EndpointSettings{DriverOpts: map[string]string{optBandwidthIn: "unlimited"}}
	})
	// What is limited moves no more than twice its rate (16mbit is 2 MB/s), what
	// is not moves more, however busy the machine is.
	const rate = 2e6
	for _, x := range []struct {
		what     string
		from, to *os.File
		addr     string
		slow     bool
	}{
		{"to a limited one", b, a, aa.Settings.IPAddress.String(), true},
		{"from a limited one", a, b, bb.Settings.IPAddress.String(), true},
		{"to one limited in sending alone", b, c, cc.Settings.IPAddress.String(), false},
		{"from it", c, b, bb.Settings.IPAddress.String(), true},
	} {
		if got := pour(t, x.from, x.to, x.addr); x.slow != (got < 2*rate) || got == 0 {
			out, _ := exec.Command("tc", "-s", "qdisc").CombinedOutput()
			t.Errorf("%s: %.1f MB/s\n%s", x.what, got/1e6, out)
		}
	}
	if err := m.Detach(ctx, "a", "slow"); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	m.exhume(m.names["slow"])
	if out, _ := exec.Command("ip", "-o", "link", "show", "type", "ifb").Output(); strings.Contains(string(out), m.vethPrefix()+"f") {
		t.Errorf("devices are left: %s", out)
	}
	for _, o := range []map[string]string{{optBandwidth: "fast"}, {optBandwidthIn: "1"}} {
		if _, err := m.Create(ctx, mnetwork.CreateRequest{Name: "x", Options: o}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: got %v", o, err)
		}
		if _, err := m.Attach(ctx, AttachRequest{ContainerID: "x", ContainerName: "x", Network: "slow", NetNS: newNS(t), Ephemeral: true, Settings: &mnetwork.EndpointSettings{DriverOpts: o}}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: got %v", o, err)
		}
	}
}

func TestLAN(t *testing.T) {
	wire := outside(t)
	echo(t, wire, ":80")
	m := newManager(t, nil)
	ctx := context.Background()
	// A VLAN is made for the network and goes with it.
	parent := "wire0.7"
	_, err := m.Create(ctx, mnetwork.CreateRequest{Name: "v7", Driver: "macvlan", Options: map[string]string{optParent: parent}})
	vlan := err == nil
	if !vlan {
		if !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "no links of kind vlan") {
			t.Fatal(err)
		}
		parent = "wire0"
	}
	create(t, m, mnetwork.CreateRequest{Name: "v7b", Driver: "macvlan", Options: map[string]string{optParent: parent, optBandwidth: "16mbit"}})
	a, b := newNS(t), newNS(t)
	aa := attach(t, m, a, "a", "v7b", nil)
	attach(t, m, b, "b", "v7b", nil)
	if got := pour(t, b, a, aa.Settings.IPAddress.String()); got == 0 || got > 4e6 {
		t.Errorf("over a limited macvlan: %.1f MB/s", got/1e6)
	}
	for _, x := range []string{"a", "b"} {
		if err := m.Detach(ctx, x, "v7b"); err != nil {
			t.Fatal(err)
		}
	}
	there := func() bool { _, err := net.InterfaceByName(parent); return err == nil }
	for _, n := range []string{"v7", "v7b"} {
		if n == "v7" && !vlan {
			continue
		}
		if !there() {
			t.Fatal("the parent is not there")
		}
		if err := m.Remove(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	if there() == vlan { // one that was there before stays
		t.Errorf("the parent %s is there: %t", parent, there())
	}
	for driver, o := range map[string]map[string]string{"macvlan": {optParent: "lo"}, "ipvlan": {optParent: "wire0", optIPvlan: "l9"}} {
		if _, err := m.Create(ctx, mnetwork.CreateRequest{Name: "x", Driver: driver, Options: o}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s %v: got %v", driver, o, err)
		}
	}
	// A network without a parent leads nowhere.
	switch _, err := m.Create(ctx, mnetwork.CreateRequest{Name: "nowhere", Driver: "macvlan"}); {
	case err == nil:
		if err := m.Remove(ctx, "nowhere"); err != nil {
			t.Fatal(err)
		}
	case !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "no links of kind dummy"):
		t.Errorf("got %v", err)
	}
}

func TestIPvlan(t *testing.T) {
	wire := outside(t)
	echo(t, wire, ":80")
	m := newManager(t, nil)
	req := mnetwork.CreateRequest{Name: "iv", Driver: "ipvlan", Options: map[string]string{optParent: "wire0"}}
	if probeIPvlan() != nil {
		_, err := m.Create(context.Background(), req)
		if !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "this kernel has no ipvlan") {
			t.Errorf("got %v", err)
		}
		return // that is all that can be shown here
	}
	for _, mode := range []string{"l2", "l3", "l3s"} {
		req.Name, req.Options[optIPvlan] = "iv"+mode, mode
		create(t, m, req)
		a, b := newNS(t), newNS(t)
		aa := attach(t, m, a, "a", req.Name, nil)
		attach(t, m, b, "b", req.Name, nil)
		echo(t, a, ":80")
		reach(t, b, aa, true)
		for _, x := range []string{"a", "b"} {
			if err := m.Detach(context.Background(), x, req.Name); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Remove(context.Background(), req.Name); err != nil {
			t.Fatal(err)
		}
	}
}
