// Package osinit is the first process of the operating system: it finds the
// read-only root and the data disk, brings the network up, starts the engine and
// keeps it running, answers the machine's host (package guest), and stops the machine
// in good order. It runs in the initial file system and goes on, as the same process,
// in the root; in VM mode shim/first.c has found the root and started the engine before it
// (ADR 57). There is no shell and no other program: what it cannot do, it says.
//
// docs/flows/vm-image.md and docs/cloudos-image.md describe what surrounds it.
package osinit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/guest"
	"github.com/cloudos-io/cloudos/internal/osinit/modules"
	"github.com/cloudos-io/cloudos/internal/osinit/process"
	"github.com/cloudos-io/cloudos/internal/osinit/uevent"
	"github.com/cloudos-io/cloudos/internal/osinit/uplink"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Main runs the machine, or does what a distribution of WSL2 asks of it; it returns only where it is not the first process.
func Main(version string) {
	if status, ok := distribution(version, os.Args[1:]); ok {
		os.Exit(status)
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "cloudos-init is the first process of CloudOS; it does nothing elsewhere")
		return
	}
	m := newMachine(version)
	defer func() {
		// The kernel panics when the first process ends, and then starts again
		// (panic=10): what went wrong is on the console until then.
		if r := recover(); r != nil {
			m.log.Printf("the first process failed: %v\n%s", r, debug.Stack())
		}
		unix.Sync()
		time.Sleep(2 * time.Second)
		os.Exit(1)
	}()
	reboot := m.run(context.Background())
	m.log.Printf("the machine is down")
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	unix.Sync()
	if err := unix.Reboot(how); err != nil {
		m.log.Printf("cannot stop the machine: %v", err)
	}
	select {}
}

// run brings the machine up and returns when it is down again.
func (m *machine) run(ctx context.Context) (reboot bool) {
	// Nothing is collected until the engine answers (settle): it would only hold up the start.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(64 << 20)
	m.early()
	m.raiseLimits()
	m.mark("init")
	adopted, err := m.adopt()
	if err == nil && !adopted {
		settleKernel()
		m.initial, err = modules.Open("/")
	}
	if err != nil {
		m.fatal(err)
	}
	listener, err := uevent.Listen()
	if err != nil {
		m.problem(err)
	}
	m.loadBeside()
	if !adopted {
		if err := m.findRoot(m.initial); err != nil {
			m.fatal(err)
		}
	}
	if err := layRoot("/"); err != nil {
		m.fatal(err)
	}
	m.mark("root")
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var parts sync.WaitGroup
	m.modules, err = modules.Open("/system")
	if err != nil {
		m.fatal(err)
	}
	m.later()
	m.firmware()
	if !adopted && m.cmdline["safe"] == "" && m.cmdline["menu"] == "" {
		m.prestart()
	}
	parts.Go(func() { m.table.Run(ctx) })
	if listener != nil {
		parts.Go(func() { m.devices(ctx, listener) })
	}
	if err := uplink.Loopback(); err != nil {
		m.problem(err)
	}
	// The engine needs its data, its configuration and a few modules; all else goes on beside
	// it, in VM mode when it has its order: there nothing before asks for the network or the host.
	var needed sync.WaitGroup
	needed.Go(m.preload)
	m.virtual = adopted
	m.meet = sync.OnceFunc(func() { close(m.met); parts.Go(m.connect) })
	if !adopted || m.cmdline["safe"] != "" || m.cmdline["menu"] != "" {
		m.meet()
	}
	parts.Go(func() { m.settle(ctx) })
	ports := m.come.subscribe()
	parts.Go(func() {
		<-m.met // there is none before
		port := &guest.Port{Engine: m.dialEngine, Log: m.log.Printf}
		port.Control = guest.NewControl(m, port.Streams)
		parts.Go(func() {
			select {
			case <-port.Control.Asked():
				close(m.hosted)
			case <-ctx.Done():
			}
		})
		if module := guest.VsockModule(); module != "" {
			parts.Go(func() {
				err := m.modules.Load(module)
				if err == nil {
					err = port.RunVsock(ctx)
				}
				if err != nil && ctx.Err() == nil {
					m.problem(err)
				}
			})
		}
		if err := port.Run(ctx, ports); err != nil && ctx.Err() == nil {
			m.problem(err)
		}
	})
	parts.Go(func() { m.show(ctx) })
	if m.wantsInstall(ctx) {
		m.cmdline["data"] = "none"
	}
	<-m.quotas
	dataErr := m.mountData(ctx)
	var closed <-chan error
	if dataErr == nil { // else a person may yet open them: the registers are to be as they were
		closed = m.closeRegisters(ctx)
	}
	m.mark("data")
	doc, err := m.configure(ctx)
	if err == nil && dataErr == nil && m.cmdline["menu"] != "" && doc.Install == nil {
		doc = m.menu(ctx, doc)
	}
	err = errors.Join(err, m.checkEncryption(doc))
	var help *rescue
	if dataErr == nil && (err != nil || m.cmdline["safe"] != "") {
		if help = m.help(err != nil); help != nil && err != nil {
			doc = help.applied
		}
	}
	m.apply(ctx, doc)
	if !adopted {
		m.tune(doc.Sysctl)
	}
	m.mark("config")
	needed.Wait()
	m.mark("modules")
	if closed != nil {
		if cerr := <-closed; cerr != nil && m.encrypted() {
			err, help = errors.Join(err, cerr), nil
		} else if cerr != nil { // a chip that fails keeps nobody's key that we know of
			m.problem(cerr)
		}
	}
	calls, lerr := listenChanges() // the engine sees at its start that there is one
	if lerr != nil {
		m.problem(lerr)
	}
	engineCtx, stopEngine := context.WithCancel(ctx)
	engineDone := make(chan struct{})
	starts := false
	switch err := errors.Join(dataErr, err); {
	case err != nil || m.cmdline["safe"] != "":
		// Safe mode: with what is sure, and the API to mend it.
		if err != nil {
			m.problem(err)
		}
		m.setState(vmwire.StateSafe)
		m.dismiss()
		close(engineDone)
	case m.installs(doc):
		m.dismiss()
		close(engineDone)
		parts.Go(func() { m.install(ctx, doc) })
	default:
		starts = true
		go func() { defer close(engineDone); m.runEngine(engineCtx) }()
	}
	if adopted {
		m.tune(doc.Sysctl)
	}
	m.meet()
	changes := newChanges(m)
	if calls != nil {
		parts.Go(func() { changes.serve(ctx, calls) })
	}
	if help != nil {
		m.mu.Lock()
		m.safeAt = help.listen
		m.mu.Unlock()
		m.change()
		parts.Go(func() { m.serveSafe(ctx, help, changes.handler()) })
	}
	// What nobody misses before the engine answers leaves it the processors, in VM mode.
	behind := func(what func()) {
		parts.Go(func() {
			if adopted && starts {
				m.awaitReady(ctx)
			}
			what()
		})
	}
	behind(func() { m.keepTime(ctx, doc.Time) })
	behind(func() { m.serveDebugShell(ctx, doc.DebugShell) })
	if starts {
		behind(func() { m.keepGood(ctx) })
	}
	if doc.Install == nil {
		behind(m.growAtStart)
	}
	parts.Go(func() { changes.confirm(ctx) })
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGUSR1, unix.SIGUSR2)
	order := order{patience: 15 * time.Second}
	select {
	case order = <-m.orders:
	case s := <-signals:
		// As with others: SIGINT is what the keyboard's reboot sends.
		order.reboot = s == unix.SIGINT
	}
	m.setState(vmwire.StateStopping)
	m.stopEngine(order.patience)
	stopEngine()
	<-engineDone
	stop()
	<-m.netDone
	m.down()
	return order.reboot
}

type order struct {
	reboot   bool
	patience time.Duration
}

var _ guest.Machine = (*machine)(nil)

// newMachine returns a machine of which nothing is known yet.
func newMachine(version string) *machine {
	m := &machine{version: version, table: process.NewTable(), orders: make(chan order, 1), state: vmwire.StateStarting,
		changed: make(chan struct{}), ready: make(chan struct{}), quotas: make(chan struct{}), met: make(chan struct{}), hosted: make(chan struct{}), boot: map[string]float64{}, dataKind: "memory"}
	m.log = newLog("cloudos: ", 256<<10)
	m.engineLog = newLog("", 512<<10)
	m.gate = m.newGate()
	return m
}
