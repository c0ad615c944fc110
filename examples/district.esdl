<?xml version="1.0" encoding="UTF-8"?>
<!-- A small district: one source, one pipe each way, one consumer. -->
<esdl:EnergySystem xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:esdl="http://www.tno.nl/esdl"
    id="6f0a1f0e-2f5e-4d0b-9b6a-0f3f3b7c5a11" name="Example district" esdlVersion="v2303" version="1">
  <instance xsi:type="esdl:Instance" id="7c1f2f52-1f8f-4a67-8a0b-6d6e8d1c9e02" name="Untitled instance">
    <area xsi:type="esdl:Area" id="0e9dd9f6-6f0f-4a13-9c3a-52a7b9f3c803" name="Area">
      <asset xsi:type="esdl:HeatProducer" id="1b8f9f1c-8a39-4cc8-8d10-3a9c0de2f104" name="Source" power="2000000.0">
        <port xsi:type="esdl:OutPort" id="aa1c7d33-53f1-4bd4-a6c4-6c0b7a1f1205" name="Out"
            carrier="supply" connectedTo="bb2d8e44-64a2-4ce5-b7d5-7d1c8b2a2306"/>
        <port xsi:type="esdl:InPort" id="cc3e9f55-75b3-4df6-88e6-8e2d9c3b3407" name="In"
            carrier="return" connectedTo="dd4fa066-86c4-4e07-99f7-9f3ead4c4508"/>
      </asset>
      <asset xsi:type="esdl:Pipe" id="2c9fa02d-9b4a-4dd9-9e21-4bad1ef30609" name="Supply" length="850.0" diameter="DN200">
        <port xsi:type="esdl:InPort" id="bb2d8e44-64a2-4ce5-b7d5-7d1c8b2a2306" name="In"
            carrier="supply" connectedTo="aa1c7d33-53f1-4bd4-a6c4-6c0b7a1f1205"/>
        <port xsi:type="esdl:OutPort" id="ee50b177-97d5-4f18-aa08-a04fbe5d560a" name="Out"
            carrier="supply" connectedTo="ff61c288-a8e6-4029-bb19-b150cf6e670b"/>
      </asset>
      <asset xsi:type="esdl:Pipe" id="3da0b13e-ac5b-4eea-af32-5cbe2f04170c" name="Return" length="850.0" diameter="DN200">
        <port xsi:type="esdl:InPort" id="1072d399-b9f7-413a-8c2a-c261d07f780d" name="In"
            carrier="return" connectedTo="2183e4aa-ca08-424b-9d3b-d372e180890e"/>
        <port xsi:type="esdl:OutPort" id="dd4fa066-86c4-4e07-99f7-9f3ead4c4508" name="Out"
            carrier="return" connectedTo="cc3e9f55-75b3-4df6-88e6-8e2d9c3b3407"/>
      </asset>
      <asset xsi:type="esdl:HeatingDemand" id="4eb1c24f-bd6c-4ffb-8043-6dcf3015280f" name="Neighbourhood" power="1500000.0">
        <port xsi:type="esdl:InPort" id="ff61c288-a8e6-4029-bb19-b150cf6e670b" name="In"
            carrier="supply" connectedTo="ee50b177-97d5-4f18-aa08-a04fbe5d560a"/>
        <port xsi:type="esdl:OutPort" id="2183e4aa-ca08-424b-9d3b-d372e180890e" name="Out"
            carrier="return" connectedTo="1072d399-b9f7-413a-8c2a-c261d07f780d"/>
      </asset>
    </area>
  </instance>
  <energySystemInformation xsi:type="esdl:EnergySystemInformation" id="5fc2d350-ce7d-4a0c-9154-7ed041263910">
    <carriers xsi:type="esdl:Carriers" id="60d3e461-df8e-4b1d-a265-8fe152374a11">
      <carrier xsi:type="esdl:HeatCommodity" id="supply" name="Supply" supplyTemperature="80.0"/>
      <carrier xsi:type="esdl:HeatCommodity" id="return" name="Return" returnTemperature="40.0"/>
    </carriers>
  </energySystemInformation>
</esdl:EnergySystem>
