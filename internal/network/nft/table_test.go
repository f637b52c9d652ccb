package nft

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// The tests run in a network namespace of their own.
func TestMain(m *testing.M) {
	if os.Getenv("SERVIN_TEST_NETNS") == "" {
		if os.Getuid() != 0 {
			fmt.Println("SKIP: making network namespaces needs root")
			return
		}
		c := exec.Command("/proc/self/exe", os.Args[1:]...)
		c.Env = append(os.Environ(), "SERVIN_TEST_NETNS=1")
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if err := c.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func bridgeFor(i int) Bridge {
	return Bridge{Name: fmt.Sprint("b", i), Subnets: []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1: byte(i)}), 64),
	}, Internal: i%3 == 0, Isolated: i%4 == 0, Open6: i%5 == 0, NoMasquerade4: i%2 == 0}
}

func portFor(i int) Port {
	p := Port{Host: netip.IPv4Unspecified(), Proto: []Proto{TCP, UDP, SCTP}[i%3], Port: uint16(1000 + i), To: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, 2}), 80)}
	switch i % 5 {
	case 1:
		p.Host, p.To = netip.IPv6Unspecified(), netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 15: 2}), 80)
	case 2:
		p.Host = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case 3:
		p.Through = true
	case 4:
		p = Port{Routed: true, Proto: TCP, To: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, 2}), uint16(i))}
	}
	return p
}

// Whatever was added and removed, and in whichever order, the kernel holds
// what the books say; and writing everything anew gives the same.
func TestBooksAndKernelAgree(t *testing.T) {
	tb := New("servin_test", true)
	tb.SetInjection(&Injection{Out: "lo", In: "in0", OutIndex: 1, To4: netip.MustParseAddr("169.254.1.2"), To6: netip.MustParseAddr("fe80::2"), Mark: 7})
	agree := func(what string) {
		t.Helper()
		if ok, err := tb.intact(); err != nil || !ok {
			t.Fatalf("after %s: %v, %v", what, ok, err)
		}
	}
	if err := tb.AddBridge(bridgeFor(0)); err != nil {
		t.Fatal(err)
	}
	if err := tb.Sync(); err != nil {
		t.Fatal(err)
	}
	agree("the first sync")
	for i := range 10 {
		if err := tb.AddBridge(bridgeFor(i)); err != nil {
			t.Fatal(err)
		}
	}
	agree("adding bridges")
	var ports []Port
	for i := range 1000 {
		ports = append(ports, portFor(i))
	}
	if err := tb.AddPorts(ports); err != nil {
		t.Fatal(err)
	}
	agree("adding ports")
	if err := tb.Sync(); err != nil {
		t.Fatal(err)
	}
	agree("writing all anew")
	if err := tb.DelPorts(ports[:500]); err != nil {
		t.Fatal(err)
	}
	if err := tb.DelPorts(ports[:10]); err != nil {
		t.Fatal("removing what is gone:", err)
	}
	agree("removing ports")
	for i := range 5 {
		if err := tb.DelBridge(fmt.Sprint("b", i)); err != nil {
			t.Fatal(err)
		}
	}
	agree("removing bridges")

	// Somebody else's change is made good by the next of ours.
	for _, harm := range []string{"flush ruleset", "delete table ip6 servin_test", "flush set ip servin_test bridges"} {
		if out, err := exec.Command("nft", harm).CombinedOutput(); err != nil {
			t.Fatalf("%s: %s", harm, out)
		}
		if ok, _ := tb.intact(); ok {
			t.Fatalf("%s was not noticed", harm)
		}
		if err := tb.DelBridge("b7"); err != nil {
			t.Fatal(err)
		}
		if err := tb.AddBridge(bridgeFor(7)); err != nil {
			t.Fatal(err)
		}
		if err := tb.Sync(); err != nil {
			t.Fatal(err)
		}
		agree(harm)
	}
	if err := tb.Delete(); err != nil {
		t.Fatal(err)
	}
	if out, _ := exec.Command("nft", "list", "tables").Output(); len(out) != 0 {
		t.Fatalf("left: %s", out)
	}
}

func TestProbe(t *testing.T) {
	if err := New("servin_test", false).Probe(); err != nil {
		t.Fatal(err)
	}
	if out, _ := exec.Command("nft", "list", "tables").Output(); len(out) != 0 {
		t.Fatalf("left: %s", out)
	}
}
