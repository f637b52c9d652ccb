// Package hyperv runs machines under Windows' Hyper-V, driven through PowerShell.
// Scripts are constants: what varies reaches them in environment variables, never as
// text. A machine is a virtual machine of generation 2 that boots the image's disk format;
// the engine's port is a vsock port of the guest (hvsocket).
//
// The package builds everywhere, so that its tests run against a simulated host; it has not been run
// on Windows by us (docs/vm.md says what was).
package hyperv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Port is the guest's vsock port.
const Port = vmwire.VsockPort

// Config is how the host is reached.
type Config struct {
	// Run runs a PowerShell script with variables in its environment.
	Run func(ctx context.Context, script string, env map[string]string) ([]byte, error)
	// Dial connects to a vsock port of the machine with the id.
	Dial func(ctx context.Context, id string, port uint32) (net.Conn, error)
}

// Driver implements vm.Driver.
type Driver struct{ cfg Config }

// New returns the driver.
func New(cfg Config) *Driver { return &Driver{cfg: cfg} }

// Name implements vm.Driver.
func (d *Driver) Name() string { return "hyperv" }

// Scripts. Each stops at its first error and prints one JSON document.
const (
	probeScript = `$ErrorActionPreference = 'Stop'
Get-Command New-VM | Out-Null
$h = Get-VMHost
@{ Version = [Environment]::OSVersion.VersionString; Host = $h.Name } | ConvertTo-Json -Compress`

	stateScript = `$ErrorActionPreference = 'Stop'
$v = Get-VM -Name $env:SERVIN_NAME -ErrorAction SilentlyContinue
if ($v) { @{ State = $v.State.ToString(); Id = $v.Id.ToString(); Disk = @($v.HardDrives | ForEach-Object { $_.Path }) } | ConvertTo-Json -Compress } else { '{}' }`

	startScript = `$ErrorActionPreference = 'Stop'
$key = 'HKLM:\SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices\' + $env:SERVIN_SERVICE
if (-not (Test-Path $key)) { New-Item -Path $key | Out-Null; Set-ItemProperty -Path $key -Name ElementName -Value 'Servin engine' }
$old = Get-VM -Name $env:SERVIN_NAME -ErrorAction SilentlyContinue
if ($old) { if ($old.State -ne 'Off') { throw 'the machine runs already' }; Remove-VM -VM $old -Force }
if (Test-Path $env:SERVIN_BOOT) { Remove-Item $env:SERVIN_BOOT }
Copy-Item $env:SERVIN_IMAGE $env:SERVIN_BOOT
if (-not (Test-Path $env:SERVIN_DATA)) { New-VHD -Path $env:SERVIN_DATA -Dynamic -SizeBytes ([uint64]$env:SERVIN_DISK) | Out-Null }
elseif ((Get-VHD $env:SERVIN_DATA).Size -lt [uint64]$env:SERVIN_DISK) { Resize-VHD -Path $env:SERVIN_DATA -SizeBytes ([uint64]$env:SERVIN_DISK) }
$v = New-VM -Name $env:SERVIN_NAME -Generation 2 -MemoryStartupBytes 1GB -NoVHD -SwitchName 'Default Switch'
Set-VMFirmware -VM $v -EnableSecureBoot Off
Set-VMProcessor -VM $v -Count ([int]$env:SERVIN_CPUS)
Set-VMMemory -VM $v -DynamicMemoryEnabled $true -MinimumBytes 512MB -MaximumBytes ([uint64]$env:SERVIN_MEMORY)
Set-VM -VM $v -AutomaticCheckpointsEnabled $false -AutomaticStartAction Nothing -AutomaticStopAction Save
Add-VMHardDiskDrive -VM $v -ControllerType SCSI -Path $env:SERVIN_BOOT
Add-VMHardDiskDrive -VM $v -ControllerType SCSI -Path $env:SERVIN_DATA
Set-VMFirmware -VM $v -FirstBootDevice (Get-VMHardDiskDrive -VM $v)[0]
Set-VMComPort -VM $v -Number 1 -Path ('\\.\pipe\' + $env:SERVIN_NAME)
Start-VM -VM $v
@{ State = 'Running'; Id = $v.Id.ToString() } | ConvertTo-Json -Compress`

	pauseScript  = `$ErrorActionPreference = 'Stop'; Suspend-VM -Name $env:SERVIN_NAME; '{}'`
	resumeScript = `$ErrorActionPreference = 'Stop'; $v = Get-VM -Name $env:SERVIN_NAME; if ($v.State -eq 'Paused') { Resume-VM -VM $v }; '{}'`
	growScript   = `$ErrorActionPreference = 'Stop'; Resize-VHD -Path $env:SERVIN_DATA -SizeBytes ([uint64]$env:SERVIN_DISK); '{}'`
	killScript   = `$ErrorActionPreference = 'Stop'
$v = Get-VM -Name $env:SERVIN_NAME -ErrorAction SilentlyContinue
if ($v) { if ($v.State -ne 'Off') { Stop-VM -VM $v -TurnOff -Force }; Remove-VM -VM $v -Force }
'{}'`
)

// state is what stateScript and startScript answer.
type state struct {
	State string
	ID    string `json:"Id"`
}

// run runs a script and reads its answer.
func (d *Driver) run(ctx context.Context, script string, env map[string]string) (state, error) {
	var st state
	out, err := d.cfg.Run(ctx, script, env)
	if err != nil {
		return st, err
	}
	out = bytes.TrimPrefix(bytes.TrimSpace(out), []byte("\xef\xbb\xbf"))
	if len(out) > 1<<20 {
		return st, errors.New("powershell said too much")
	}
	if err := json.Unmarshal(out, &st); err != nil {
		return st, fmt.Errorf("cannot read powershell's answer: %w", err)
	}
	return st, nil
}

// variables of a machine.
func variables(s vm.Spec) map[string]string {
	return map[string]string{
		"SERVIN_NAME": "servin-" + s.Name, "SERVIN_IMAGE": s.Image.Disk, "SERVIN_BOOT": filepath.Join(s.State, "boot.vhdx"),
		"SERVIN_DATA": strings.TrimSuffix(s.Data, filepath.Ext(s.Data)) + ".vhdx", "SERVIN_DISK": strconv.FormatInt(s.Disk, 10),
		"SERVIN_CPUS": strconv.Itoa(s.CPUs), "SERVIN_MEMORY": strconv.FormatInt(s.Memory, 10),
		// The template that Hyper-V has for vsock ports.
		"SERVIN_SERVICE": fmt.Sprintf("%08x-facb-11e6-bd58-64006a7986d3", Port),
	}
}

// Probe implements vm.Driver.
func (d *Driver) Probe(ctx context.Context, img vm.Image, _ string) (vm.Host, error) {
	if img.Dir != "" && img.Disk == "" {
		return vm.Host{}, fits(img)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := d.cfg.Run(ctx, probeScript, nil)
	if err != nil {
		return vm.Host{}, fault.New(fault.Unsupported, "cannot use Hyper-V: %w; switch it on (Enable-WindowsOptionalFeature -Online -FeatureName Microsoft-Hyper-V) and join the group Hyper-V Administrators", err)
	}
	var v struct{ Version string }
	if err := json.Unmarshal(bytes.TrimSpace(out), &v); err != nil {
		return vm.Host{}, fmt.Errorf("cannot read powershell's answer: %w", err)
	}
	return vm.Host{Accelerator: "hyper-v", Version: v.Version}, nil
}

func fits(img vm.Image) error {
	if img.Disk == "" {
		return fault.New(fault.Invalid, "Hyper-V boots disks: build the image with 'cloudos image build --format disk', convert it (qemu-img convert -O vhdx) and name its folder")
	}
	return nil
}

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, s vm.Spec, _ vm.Host, report func(string)) (vm.Machine, error) {
	if err := fits(s.Image); err != nil {
		return nil, err
	}
	if _, err := os.Stat(s.Image.Disk); err != nil {
		return nil, err
	}
	report("starting the machine")
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	st, err := d.run(ctx, startScript, variables(s))
	if err != nil {
		return nil, fmt.Errorf("cannot start the machine: %w", err)
	}
	return newMachine(d, s, st.ID), nil
}

// Attach implements vm.Driver. The machine's name alone finds it.
func (d *Driver) Attach(ctx context.Context, r vm.Record) (vm.Machine, error) {
	st, err := d.run(ctx, stateScript, variables(r.Spec))
	if err != nil {
		return nil, err
	}
	switch st.State {
	case "":
		return nil, nil
	case "Running", "Paused", "Starting":
		return newMachine(d, r.Spec, st.ID), nil
	}
	_, err = d.run(ctx, killScript, variables(r.Spec))
	return nil, err
}

// Machine is a virtual machine of Hyper-V.
type Machine struct {
	d    *Driver
	spec vm.Spec
	id   string
	once sync.Once
	quit chan struct{}
}

var (
	_ vm.Driver  = (*Driver)(nil)
	_ vm.Pauser  = (*Machine)(nil)
	_ vm.Resizer = (*Machine)(nil)
	_ vm.Reaches = (*Machine)(nil)
)

func newMachine(d *Driver, s vm.Spec, id string) *Machine {
	return &Machine{d: d, spec: s, id: id, quit: make(chan struct{})}
}

// Record implements vm.Machine.
func (m *Machine) Record() vm.Record { return vm.Record{Driver: "hyperv", Spec: m.spec} }

// PID implements vm.Machine: the process is the system's.
func (m *Machine) PID() int { return 0 }

// ShareProblems implements vm.Reaches.
func (m *Machine) ShareProblems() map[string]string {
	p := map[string]string{}
	for _, s := range m.spec.Shares {
		p[s.Path] = "Hyper-V's machines have no virtiofs"
	}
	return p
}

// Port implements vm.Machine.
func (m *Machine) Port(ctx context.Context) (net.Conn, error) {
	return m.d.cfg.Dial(ctx, m.id, Port)
}

func (m *Machine) do(ctx context.Context, script string) error {
	_, err := m.d.run(ctx, script, variables(m.spec))
	return err
}

// Pause implements vm.Pauser.
func (m *Machine) Pause(ctx context.Context) error { return m.do(ctx, pauseScript) }

// Resume implements vm.Pauser.
func (m *Machine) Resume(ctx context.Context) error { return m.do(ctx, resumeScript) }

// Paused implements vm.Pauser.
func (m *Machine) Paused(ctx context.Context) (bool, error) {
	st, err := m.d.run(ctx, stateScript, variables(m.spec))
	return st.State == "Paused", err
}

// GrowDisk implements vm.Resizer.
func (m *Machine) GrowDisk(ctx context.Context, bytes int64) error {
	env := variables(m.spec)
	env["SERVIN_DISK"] = strconv.FormatInt(bytes, 10)
	_, err := m.d.run(ctx, growScript, env)
	return err
}

// Kill implements vm.Machine.
func (m *Machine) Kill(ctx context.Context) error {
	if err := m.do(ctx, killScript); err != nil {
		return fmt.Errorf("cannot end the machine: %w", err)
	}
	return nil
}

// Wait implements vm.Machine.
func (m *Machine) Wait(ctx context.Context) error {
	for {
		st, err := m.d.run(ctx, stateScript, variables(m.spec))
		if err == nil && (st.State == "" || st.State == "Off") {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.quit:
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

// Close implements vm.Machine.
func (m *Machine) Close() error {
	m.once.Do(func() { close(m.quit) })
	return nil
}
