package osimage

import (
	"slices"

	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
)

// notOnARM are modules of the lists that Debian's kernels for arm64 do not have: they
// drive what comes with Intel's and AMD's processors.
var notOnARM = []string{
	"uhci_hcd", "vmd", "vmw_pvscsi", "forcedeth", "via_rhine", "iTCO_wdt", "sp5100_tco", "coretemp", "k10temp", "intel_rapl_msr", "acpi_cpufreq",
	"kvm_intel", "kvm_amd", "arcmsr",
}

// What servers and boards with arm64 have instead: disks, and then network cards and watchdogs.
var (
	armDisks = []string{"ahci_*", "sata_*", "sdhci*", "dw_mmc*", "bcm2835", "cqhci", "renesas_sdhi*", "sunxi_mmc", "meson_gx_mmc"}
	armMetal = []string{
		"nicvf", "nicpf", "thunder_*", "hns_dsaf", "hns_enet_drv", "hns_mdio", "hns3", "hclge*", "bcm2835_wdt", "bcm2835_thermal", "bcm2835_rng", "hinic", "amd_xgbe", "xgene_enet*", "macb", "genet", "stmmac*", "dwmac*", "mvneta", "mvpp2", "mvmdio",
		"netsec", "smsc911x", "fsl_enetc*", "fsl_dpaa2*", "xgmac_mdio", "qcom_emac", "ti_am65*", "fec", "sbsa_gwdt", "ipmi_ssif", "cppc_cpufreq", "scpi*",
	}
)

// modulesFor is a pair of lists as a kernel of an architecture has them.
func modulesFor(arch string, kind kernel.Kind, initial, all []string) (forInitial, forAll []string) {
	if arch != "arm64" {
		return initial, all
	}
	without := func(list []string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(name string) bool { return slices.Contains(notOnARM, name) })
	}
	forInitial, forAll = without(initial), without(all)
	if kind == kernel.Metal {
		forInitial = append(forInitial, armDisks...)
		forAll = append(append(forAll, armDisks...), armMetal...)
	}
	return forInitial, forAll
}
