package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	corev1 "k8s.io/api/core/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

func checkSummary(b []byte, pod string) error {
	var s statsapi.Summary
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	for _, p := range s.Pods {
		if p.PodRef.Name != pod {
			continue
		}
		if len(p.Containers) != 1 {
			return fmt.Errorf("%d containers", len(p.Containers))
		}
		c := p.Containers[0]
		switch {
		case c.CPU == nil || c.CPU.UsageNanoCores == nil || *c.CPU.UsageNanoCores == 0 || c.CPU.UsageCoreNanoSeconds == nil:
			return fmt.Errorf("cpu %+v", c.CPU)
		case c.Memory == nil || c.Memory.WorkingSetBytes == nil || *c.Memory.WorkingSetBytes == 0:
			return fmt.Errorf("memory %+v", c.Memory)
		case c.Rootfs == nil || c.Rootfs.UsedBytes == nil:
			return fmt.Errorf("file system %+v", c.Rootfs)
		case s.Node.Fs == nil || s.Node.Runtime == nil || s.Node.Runtime.ImageFs == nil || s.Node.Runtime.ImageFs.UsedBytes == nil:
			return errors.New("no figures of the image file system")
		}
		return nil
	}
	return fmt.Errorf("no figures of %s", pod)
}

// logind stands for systemd's: there is none where tests run. Of what a kubelet
// asks it answers all: how long it waits, and the lock that holds the shutdown up.
type logind struct{ lock *os.File }

func (l *logind) Inhibit(what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	l.lock = r
	time.AfterFunc(time.Second, func() { w.Close() }) // the message has it by then
	return dbus.UnixFD(w.Fd()), nil
}

// Get answers for the one property.
func (l *logind) Get(iface, name string) (dbus.Variant, *dbus.Error) {
	if name == "InhibitDelayMaxUSec" {
		return dbus.MakeVariant(uint64(3600 * 1e6)), nil
	}
	return dbus.Variant{}, dbus.MakeFailedError(errors.New("no such property"))
}

// TestGracefulShutdown: at the host's shutdown a kubelet ends ordinary pods
// first, then critical ones, and each has its time.
func TestGracefulShutdown(t *testing.T) {
	dir, err := os.MkdirTemp("", "db")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	address := "unix:path=" + dir + "/bus"
	conf := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>` + address + `</listen><auth>EXTERNAL</auth>
<policy context="default"><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/><allow user="*"/></policy></busconfig>`
	if err := os.WriteFile(dir+"/bus.conf", []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	bus := exec.Command("dbus-daemon", "--nofork", "--config-file", dir+"/bus.conf")
	bus.Stdout, bus.Stderr = os.Stdout, os.Stderr
	if err := bus.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = bus.Process.Kill(); _ = bus.Wait() }()
	eventually(t, "the bus", func() error {
		c, err := net.Dial("unix", dir+"/bus")
		if err == nil {
			c.Close()
		}
		return err
	})
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	l := &logind{}
	const object = "/org/freedesktop/login1"
	if err := errors.Join(conn.Export(l, object, "org.freedesktop.login1.Manager"), conn.Export(l, object, "org.freedesktop.DBus.Properties")); err != nil {
		t.Fatal(err)
	}
	if r, err := conn.RequestName("org.freedesktop.login1", 0); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}

	n := newNode(t, false)
	n.stopKubelet()
	n.extra = "shutdownGracePeriod: 20s\nshutdownGracePeriodCriticalPods: 10s\n"
	n.env = append(n.env, "DBUS_SYSTEM_BUS_ADDRESS="+address)
	n.startKubelet()
	out := filepath.Join(n.dir, "order")
	if err := os.MkdirAll(out, 0o777); err != nil {
		t.Fatal(err)
	}
	pod := func(name, more string) string {
		return more + `  terminationGracePeriodSeconds: 8
  volumes: [{name: v, hostPath: {path: ` + out + `}}]
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, "trap 'sleep 1; echo ` + name + ` >>/v/log; exit 0' TERM; while :; do sleep 0.1; done"], volumeMounts: [{name: v, mountPath: /v}]}
`
	}
	n.up(t, "critical", pod("critical", "  priorityClassName: system-node-critical\n  priority: 2000001000\n"))
	n.up(t, "ordinary", pod("ordinary", ""))
	eventually(t, "the kubelet's lock", func() error {
		if l.lock == nil {
			return errors.New("not asked for")
		}
		return nil
	})
	time.Sleep(2 * time.Second)
	if err := conn.Emit(object, "org.freedesktop.login1.Manager.PrepareForShutdown", true); err != nil {
		t.Fatal(err)
	}
	// The lock is given up when all pods have ended.
	released := make(chan error, 1)
	go func() {
		_, err := l.lock.Read(make([]byte, 1))
		released <- err
	}()
	select {
	case <-released:
	case <-time.After(60 * time.Second):
		t.Fatalf("the shutdown is held up still\n%s", n.errors())
	}
	if b, _ := os.ReadFile(out + "/log"); string(b) != "ordinary\ncritical\n" {
		t.Errorf("order %q", b)
	}
	ps, err := n.pods()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ordinary", "critical"} {
		if p := ps[name]; p.Status.Phase != corev1.PodFailed && p.Status.Phase != corev1.PodSucceeded {
			t.Errorf("%s is %s", name, p.Status.Phase)
		}
	}
}
