package osimage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
)

// Parts of an image, as inspect tells them.
const (
	partKernel   = "kernel"
	partLoader   = "boot loader"
	partModules  = "modules"
	partInit     = "init"
	partEngine   = "engine"
	partBuilder  = "builder"
	partCerts    = "certificates"
	partSettings = "settings"
)

// rootModules find the root and the data in a virtual machine.
var rootModules = []string{"virtio_pci", "virtio_blk", "squashfs", "quota_v2"}[:4:4]

// earlyModules are what the engine uses while it starts (package osinit loads
// them): in a virtual machine they are loaded while the disks are looked for.
var earlyModules = []string{"overlay", "virtio_console", "virtio_net"}

// diskModules find the root on a cloud's disk.
var diskModules = append([]string{"virtio_scsi", "sd_mod", "nvme", "hv_vmbus", "hv_storvsc", "xen_blkfront", "isofs", "dm_verity", "sha256_*", "efivarfs"}, rootModules...)

// isoModules find the root on any machine's disk, stick or disc.
var isoModules = append([]string{
	"ahci", "ata_piix", "ata_generic", "sr_mod", "cdrom", "loop", "usb_storage", "uas", "xhci_pci", "ehci_pci", "ohci_pci", "uhci_hcd", "usbhid", "hid_generic",
	"sdhci_pci", "sdhci_acpi", "mmc_block", "megaraid_sas", "mpt3sas", "vmd", "vmw_pvscsi", "mptspi", "virtio_mmio",
}, diskModules...)

// cloudModules are what the engine and a virtual machine need.
var cloudModules = []string{
	"virtio_*", "net_failover", "virtiofs", "fuse", "overlay", "loop",
	"veth", "bridge", "br_netfilter", "macvlan", "ipvlan", "8021q", "bonding", "tun", "dummy", "vxlan", "wireguard",
	"nf_tables", "nft_*", "nf_nat", "nf_conntrack", "nf_conntrack_netlink", "nf_dup_*", "nf_defrag_*", "nf_reject_*", "nf_tproxy_*", "nfnetlink*",
	"nf_log_syslog", "xt_*", "ip_tables", "ip6_tables", "iptable_*", "ip6table_*", "ip_vs*", "ip_set*", "kernel/net/netfilter/nf_conntrack_*",
	"sch_*", "cls_*", "act_*", "ifb", "sctp", "inet_diag", "tcp_diag", "udp_diag", "unix_diag", "netlink_diag", "sctp_diag", "af_packet",
	"nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8", "vfat", "isofs", "nfs", "nfsv4", "nfsv3", "cifs", "erofs", "squashfs", "ext4", "quota_v2", "quota_tree",
	"tcp_bbr", "nvme", "ena", "gve", "hv_*", "xen_blkfront", "xen_netfront", "vmxnet3", "vmw_*", "virtio_scsi", "sd_mod", "sr_mod",
	"vsock", "vmw_vsock_virtio_transport", "rng_core", "binfmt_misc", "ipt_*", "ip6t_*", "crc32c_generic", "algif_*", "ixgbevf", "pvpanic*",
}

// vmModules are cloudModules without the disks and cards of clouds: a machine of VM
// mode has virtio's, or Hyper-V's.
func vmModules() []string {
	return slices.DeleteFunc(slices.Clone(cloudModules), func(m string) bool {
		return slices.Contains([]string{"ena", "gve", "ixgbevf", "nvme", "xen_blkfront", "xen_netfront", "vmxnet3"}, m)
	})
}

// trustModules are for Secure Boot's state and for encrypted data, on what is no
// virtual machine of VM mode.
var trustModules = []string{"efivarfs", "tpm*", "xts", "ecb", "aesni*", "aes_ce*", "sha256_*", "dm_crypt", "dm_verity"}

// metalModules add the drivers of real machines: disks, network cards, what a
// screen and a keyboard need. Those of cards that are nothing without firmware, which images do
// not have, are left out: bnx2, bnx2x, qede.
var metalModules = append([]string{
	"e1000", "e1000e", "igb", "igc", "ixgbe", "i40e", "ice", "r8169", "r8152", "tg3", "bnxt_en", "atlantic", "alx", "atl1c", "sky2", "skge", "forcedeth",
	"8139too", "8139cp", "pcnet32", "ne2k_pci", "via_rhine", "mlx4_en", "mlx5_core", "be2net", "cxgb4", "sfc", "enic", "nfp", "jme", "vmxnet3",
	"cdc_ether", "cdc_ncm", "asix", "ax88179_178a", "smsc95xx", "lan78xx", "realtek", "broadcom", "marvell", "phy*",
	"i6300esb", "iTCO_wdt", "sp5100_tco", "ipmi_si", "ipmi_devintf", "ipmi_watchdog", "coretemp", "k10temp", "intel_rapl_msr", "acpi_cpufreq",
	"btrfs", "xfs", "kvm_intel", "kvm_amd", "hpsa", "aacraid", "arcmsr", "3w_9xxx", "sata_*", "pata_*", "raid0", "raid1", "raid10", "raid456", "dm_raid", "dm_mod", "mmc_block",
}, append(append([]string{}, cloudModules...), isoModules...)...)

// initialRoot is what the kernel unpacks: the first process and the modules
// that find the root.
func initialRoot(o Options, k *kernel.Kernel, modules []string) (*tree.Tree, error) {
	t := tree.New()
	for _, d := range []string{"dev", "proc", "sys", "run", "new"} {
		t.Dir(d, 0o755)
	}
	t.Device("dev/console", 0o600, 5, 1)
	t.Device("dev/null", 0o666, 1, 3)
	picked, err := addModules(t, k, modules)
	if err != nil {
		return nil, err
	}
	if o.Format == "vm" {
		return t, addFirst(t, o, k, picked)
	}
	if _, err := t.File("init", 0o755, partInit, filepath.Join(o.Programs, "cloudos-init")); err != nil {
		return nil, fmt.Errorf("%w (make build)", err)
	}
	return t, nil
}

// moduleFolder is where a kernel's modules are.
func moduleFolder(k *kernel.Kernel) string { return "lib/modules/" + k.Version + "/" }

func addModules(t *tree.Tree, k *kernel.Kernel, patterns []string) ([]*kernel.Module, error) {
	picked, err := k.Pick(patterns...)
	if err != nil {
		return nil, err
	}
	base := moduleFolder(k)
	for _, m := range picked {
		t.Bytes(base+m.Path, 0o644, partModules, m.Data)
	}
	b, err := index(picked)
	if err != nil {
		return nil, err
	}
	t.Bytes(base+"cloudos.index", 0o644, partModules, b)
	return picked, nil
}

// programs of ours in the root, by part.
var programs = []struct {
	name, part string
	optional   bool
}{
	{"servind", partEngine, false},
	{"servin-runtime", partEngine, false},
	{"servin-buildd", partBuilder, true},
	{"servin-toolbox.tar.gz", partEngine, true},
	{"cloudos-modprobe", partInit, false},
	{"cloudos-seal", partInit, true},
}

// systemRoot is the read-only root. It is mounted at /system; the names at the top of the tree
// that programs expect are links to it. Without a kernel it is a distribution's (wsl.go).
func systemRoot(ctx context.Context, o Options, apt *kernel.Apt, k *kernel.Kernel, modules []string) (*tree.Tree, error) {
	t := tree.New()
	for _, p := range programs {
		from := filepath.Join(o.Programs, p.name)
		if p.name == "cloudos-seal" && (o.Format == "vm" || k == nil) {
			continue // its disk is the host's to protect
		}
		if p.name == "cloudos-modprobe" && k == nil {
			continue // the kernel asks somebody else
		}
		if _, err := os.Stat(from); err != nil && p.optional {
			o.Log("leaving out %s: it is not among the programs", p.name)
			continue
		}
		perm := os.FileMode(0o755)
		if strings.HasSuffix(p.name, ".gz") {
			perm = 0o644
		}
		if _, err := t.File("bin/"+p.name, perm, p.part, from); err != nil {
			return nil, fmt.Errorf("%w (make build)", err)
		}
	}
	if k != nil {
		if _, err := addModules(t, k, modules); err != nil {
			return nil, err
		}
	}
	certs, err := certificates(ctx, apt)
	if err != nil {
		return nil, err
	}
	t.Bytes("etc/ssl/certs/ca-certificates.crt", 0o644, partCerts, certs)
	release := fmt.Sprintf("NAME=CloudOS\nID=cloudos\nVERSION_ID=%q\nPRETTY_NAME=%q\nHOME_URL=https://github.com/cloudos-io/cloudos\n", o.Version, "CloudOS "+o.Version)
	for name, text := range map[string]string{
		"passwd":          "root:x:0:0:root:/var/root:/nonexistent\nnobody:x:65534:65534:nobody:/nonexistent:/nonexistent\n",
		"group":           "root:x:0:\nservin:x:990:\nnogroup:x:65534:\n",
		"subuid":          "",
		"subgid":          "",
		"os-release":      release,
		"nsswitch.conf":   "passwd: files\ngroup: files\nhosts: files dns\n",
		"services":        "",
		"protocols":       "icmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\nsctp 132 SCTP\n",
		"cloudos/version": o.Version + "\n",
	} {
		t.Bytes("etc/"+name, 0o644, partSettings, []byte(text))
	}
	if len(o.Config) > 0 {
		t.Bytes(strings.TrimPrefix(config.InImage, "/"), 0o600, partSettings, o.Config)
	}
	for _, name := range []string{"resolv.conf", "hostname", "hosts", "machine-id"} {
		t.Symlink("etc/"+name, "/run/cloudos/etc/"+name)
	}
	t.Symlink("etc/mtab", "/proc/self/mounts")
	return t, nil
}

// certificates returns Mozilla's authorities as Debian packs them, in one file.
func certificates(ctx context.Context, apt *kernel.Apt) ([]byte, error) {
	deb, err := apt.Download(ctx, "ca-certificates")
	if err != nil {
		return nil, err
	}
	found := map[string][]byte{}
	err = kernel.Files(ctx, deb, func(name string, _ int64, r io.Reader) error {
		if strings.HasPrefix(name, "usr/share/ca-certificates/mozilla/") && strings.HasSuffix(name, ".crt") {
			b, err := io.ReadAll(r)
			found[name] = append(bytes.TrimSpace(b), '\n')
			return err
		}
		return nil
	})
	if err != nil || len(found) == 0 {
		return nil, fmt.Errorf("cannot read the certificates' package (%d found): %w", len(found), err)
	}
	var names []string
	for n := range found {
		names = append(names, n)
	}
	slices.Sort(names)
	var out []byte
	for _, n := range names {
		out = append(out, found[n]...)
	}
	return out, nil
}
